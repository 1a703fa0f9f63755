// Thread-block clusters (sm_90 and up): blocks that run at the same time on neighbouring multiprocessors, wait for
// each other, and read and write each other's shared memory ("distributed"). As in ptx.cuh, each wrapper holds its
// device body (PTX) and its emulator body side by side.
//
// An entry is declared `__cluster_dims__(CLUSTER, 1, 1)`; CLUSTER is what `launch_of(..., cluster=n)` defines. The n
// blocks of a cluster follow each other along x.
//
// A block's shared memory may be accessed by others once it runs, which is known after a first cluster barrier, and
// no longer when it has ended. So a kernel that uses cluster_load or cluster_store is framed by two barriers:
//     cluster_sync();     every block runs, and what each has written to its shared memory is seen by all
//     … cluster_load, cluster_store …
//     cluster_sync();     nobody accesses anybody's shared memory any more
//
// GPUs before Hopper run clusters of one block, which need no hardware: all functions are there, in plain CUDA.
#pragma once
#include "ptx_async.cuh"

#if !defined(EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#if defined(CLUSTER) && CLUSTER > 1
#error "ptx_cluster.cuh: clusters of several blocks need sm_90 or newer"
#endif
#undef __cluster_dims__
#define __cluster_dims__(...)

DEVICE unsigned cluster_rank() { return 0; }
DEVICE unsigned cluster_blocks() { return 1; }
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() { __syncthreads(); }
DEVICE void cluster_sync() { __syncthreads(); }
template <class T> DEVICE T cluster_load(const T* shared, unsigned) { return *shared; }
template <class T> DEVICE void cluster_store(T* shared, unsigned, T value) { *shared = value; }

#else

// The number of this block within its cluster. PTX: %cluster_ctarank.
DEVICE unsigned cluster_rank() {
#ifdef EMULATOR
  return emulator_cluster_rank();
#else
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

// How many blocks the cluster has. PTX: %cluster_nctarank.
DEVICE unsigned cluster_blocks() {
#ifdef EMULATOR
  return emulator_cluster_blocks();
#else
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#endif
}

// The barrier of all threads of all blocks of the cluster, in two halves between which a thread may do other things.
// PTX: what a thread did before it arrived, in global and in any shared memory, is seen by all threads after their
// wait; a warp executes each half together; a thread waits before it arrives again.
DEVICE void cluster_arrive(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_cluster_arrive({file, line});
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

DEVICE void cluster_wait(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_cluster_wait({file, line});
#else
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

DEVICE void cluster_sync(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_cluster_arrive({file, line});
  emulator_cluster_wait({file, line});
#else
  cluster_arrive();
  cluster_wait();
#endif
}

// The same __shared__ variable, 4 or 8 bytes of it, in the block of the given rank (which may be one's own). PTX: mapa
// turns an address in one's own shared memory into that of the same place in another block's.
template <class T> DEVICE T cluster_load(const T* shared, unsigned rank CALLER) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a distributed access moves 4 or 8 bytes");
  T value;
#ifdef EMULATOR
  emulator_cluster_load(&value, shared, rank, sizeof(T), {file, line});
#else
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  if constexpr (sizeof(T) == 8) {
    unsigned long long bits;
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(bits) : "r"(address) : "memory");
    memcpy(&value, &bits, 8);
  } else {
    unsigned bits;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(bits) : "r"(address) : "memory");
    memcpy(&value, &bits, 4);
  }
#endif
  return value;
}

template <class T> DEVICE void cluster_store(T* shared, unsigned rank, T value CALLER) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a distributed access moves 4 or 8 bytes");
#ifdef EMULATOR
  emulator_cluster_store(&value, shared, rank, sizeof(T), {file, line});
#else
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  if constexpr (sizeof(T) == 8) {
    unsigned long long bits;
    memcpy(&bits, &value, 8);
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(address), "l"(bits) : "memory");
  } else {
    unsigned bits;
    memcpy(&bits, &value, 4);
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
  }
#endif
}

#endif

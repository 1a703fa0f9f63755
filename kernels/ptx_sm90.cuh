// What Hopper adds (sm_90a): mbarriers, bulk copies by tensor maps (TMA), and matrix multiplication by a whole
// warpgroup (wgmma). As in ptx.cuh, each wrapper holds its device body (PTX) and its emulator body side by side;
// addresses of shared memory are those of shared_address().
//
// Ordinary loads and stores belong to the generic proxy, TMA and wgmma to the async proxy, and the two do not see
// each other's writes by themselves. From the async proxy to the generic one, waiting for an mbarrier or a group
// is enough. The other way a thread that has written shared memory executes fence_proxy_async() before the
// barrier behind which TMA or wgmma uses the data.
#pragma once
#include "ptx_async.cuh"

#if !defined(EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#error "ptx_sm90.cuh: compile for sm_90a"
#endif

// ---- fences ---------------------------------------------------------------------------------------------
// PTX: fence.proxy.async orders what the executing thread has done to shared memory through the generic proxy
// before what the async proxy does later.
DEVICE void fence_proxy_async() {
#ifdef EMULATOR
  emulator_fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// PTX: fence.mbarrier_init makes the thread's mbarrier_init visible to the async proxy (and to the cluster). It
// stands between mbarrier_init and the block barrier that all users of the mbarrier pass.
DEVICE void fence_mbarrier_init() {
#ifdef EMULATOR
  emulator_fence_mbarrier_init();
#else
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// ---- mbarriers ------------------------------------------------------------------------------------------
// An mbarrier is 8 bytes of shared memory at a multiple of 8 that belong to these functions alone. It counts its
// phases 0, 1, 2, … A phase completes when `count` threads have arrived and all bytes that they expected have
// been written by bulk copies; the next one then begins with the same count. What a thread did before it arrived,
// and what the copies wrote, is seen by the threads that waited for the phase.
struct __align__(8) Mbarrier { unsigned long long state; };

// PTX: 1 <= count < 2^20. One thread initialises; see fence_mbarrier_init for what follows.
DEVICE void mbarrier_init(unsigned barrier, unsigned count CALLER) {
#ifdef EMULATOR
  emulator_mbarrier_init(barrier, count, {file, line});
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#endif
}

// PTX: after this, and only then, the memory may be used for anything else.
DEVICE void mbarrier_inval(unsigned barrier CALLER) {
#ifdef EMULATOR
  emulator_mbarrier_inval(barrier, {file, line});
#else
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

DEVICE void mbarrier_arrive(unsigned barrier CALLER) {
#ifdef EMULATOR
  emulator_mbarrier_arrive(barrier, 0, {file, line});
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#endif
}

// PTX: the current phase also waits for `bytes` (less than 2^20 at any time) of bulk copies; then arrives.
DEVICE void mbarrier_arrive_expect_tx(unsigned barrier, unsigned bytes CALLER) {
#ifdef EMULATOR
  emulator_mbarrier_arrive(barrier, bytes, {file, line});
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#endif
}

// Of the block of that rank in the cluster, the mbarrier at the same place of its shared memory. PTX: what the thread
// did before is seen by those who wait with mbarrier_wait_cluster. The block must run: see ptx_cluster.cuh.
DEVICE void mbarrier_arrive_at(unsigned barrier, unsigned rank CALLER) {
#ifdef EMULATOR
  emulator_mbarrier_arrive_at(barrier, rank, {file, line});
#else
  asm volatile("{\n"
               ".reg .b32 there;\n"
               "mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n"
               "}" ::"r"(barrier), "r"(rank) : "memory");
#endif
}

// PTX: true if the phase of this parity has completed, which is to say that the current phase has the other one;
// so the phase "before the first" has parity 1 and has completed. May suspend the thread for a while, and may
// return false for no reason. Only a call that returned true orders memory.
DEVICE bool mbarrier_try_wait(unsigned barrier, unsigned parity CALLER) {
#ifdef EMULATOR
  return emulator_mbarrier_try_wait(barrier, parity, {file, line});
#else
  unsigned complete;
  asm volatile("{\n"
               ".reg .pred complete;\n"
               "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
               "selp.u32 %0, 1, 0, complete;\n"
               "}" : "=r"(complete) : "r"(barrier), "r"(parity) : "memory");
  return complete;
#endif
}

DEVICE void mbarrier_wait(unsigned barrier, unsigned parity CALLER) {
#ifdef EMULATOR
  while (!emulator_mbarrier_try_wait(barrier, parity, {file, line})) {}
#else
  while (!mbarrier_try_wait(barrier, parity)) {}
#endif
}

// The same for a phase at which threads of other blocks of the cluster arrive, too.
DEVICE void mbarrier_wait_cluster(unsigned barrier, unsigned parity CALLER) {
#ifdef EMULATOR
  while (!emulator_mbarrier_try_wait(barrier, parity, {file, line})) {}
#else
  unsigned complete;
  do {
    asm volatile("{\n"
                 ".reg .pred complete;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, complete;\n"
                 "}" : "=r"(complete) : "r"(barrier), "r"(parity) : "memory");
  } while (!complete);
#endif
}

// ---- one thread of a warp, registers of a warpgroup, dependent grids ------------------------------------
// PTX: elect.sync returns true in one of the lanes of `mask`, which all execute it; always the same one for the
// same mask, but nobody says which.
DEVICE bool elect_one(unsigned mask = 0xffffffffu CALLER) {
#ifdef EMULATOR
  return emulator_elect(mask, {file, line});
#else
  unsigned elected;
  asm volatile("{\n"
               ".reg .pred elected;\n"
               "elect.sync _|elected, %1;\n"
               "selp.u32 %0, 1, 0, elected;\n"
               "}" : "=r"(elected) : "r"(mask));
  return elected;
#endif
}

// PTX: changes the registers a thread may use; all warps of the warpgroup execute it. COUNT is 24 to 256, a
// multiple of 8. setmaxnreg_inc blocks until other warpgroups have given enough back. Takes effect only where
// the kernel has a register cap at entry: __launch_bounds__(threads, 1).
template <int COUNT> DEVICE void setmaxnreg_inc(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_setmaxnreg(COUNT, {file, line});
#else
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT> DEVICE void setmaxnreg_dec(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_setmaxnreg(COUNT, {file, line});
#else
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

// PTX: for grids launched with programmatic stream serialisation. griddepcontrol.wait returns when the grids
// before have ended and their memory is visible; launch_dependents lets the next grid start. Without that launch
// attribute both do nothing, and so they do in the emulator, where one grid ends before the next begins.
DEVICE void griddepcontrol_wait() {
#ifndef EMULATOR
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void griddepcontrol_launch_dependents() {
#ifndef EMULATOR
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// ---- bulk copies ----------------------------------------------------------------------------------------
// How a tensor lies in global memory and which box of it one copy moves: made by cnnops/cuda/tensor_map.py, opaque
// here. An entry takes it as `const __grid_constant__ TensorMap`: it must not be copied to local memory.
struct __align__(64) TensorMap { unsigned long long opaque[16]; };

// Where the 16-byte pieces of a tile lie in shared memory, against bank conflicts: bits 4 to 6 of an address are
// XORed with bits 7 to 9 (128B), bits 4 and 5 with 7 and 8 (64B), or bit 4 with 7 (32B). A tile starts at a
// multiple of the pattern, which repeats after 1024, 512 or 256 bytes (128 where there is no swizzle), and its
// innermost dimension is as wide as the swizzle's name says. The numbers are CUtensorMapSwizzle's.
enum Swizzle { SWIZZLE_NONE, SWIZZLE_32B, SWIZZLE_64B, SWIZZLE_128B };
DEVICE constexpr unsigned swizzled(unsigned address, Swizzle swizzle) {
  return address ^ (address >> 3 & ((16u << swizzle) - 16));
}

// Brings a descriptor to the cache ahead of its first use.
DEVICE void tma_prefetch(const TensorMap& map CALLER) {
#ifdef EMULATOR
  emulator_tma_prefetch(&map, {file, line});
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

// Loads one box of the map to `tile`; one thread executes it. PTX: coordinates are of the box's first element,
// innermost dimension first, and may be negative or too large: what lies outside of the tensor is read as zero.
// When the data is there, the bytes of the whole box, zeros included, count for `barrier`, of which some thread
// expects them in the current phase (mbarrier_arrive_expect_tx). Until a wait for that phase the tile may be
// neither read nor written.
DEVICE void tma_load(unsigned tile, const TensorMap& map, unsigned barrier, int c0, int c1 CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{2, {c0, c1}, false, {}};
  emulator_tma_load(tile, &map, barrier, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c0), "r"(c1) : "memory");
#endif
}

DEVICE void tma_load(unsigned tile, const TensorMap& map, unsigned barrier, int c0, int c1, int c2 CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{3, {c0, c1, c2}, false, {}};
  emulator_tma_load(tile, &map, barrier, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5}], [%2];"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2) : "memory");
#endif
}

DEVICE void tma_load(unsigned tile, const TensorMap& map, unsigned barrier, int c0, int c1, int c2, int c3 CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{4, {c0, c1, c2, c3}, false, {}};
  emulator_tma_load(tile, &map, barrier, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2];"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
#endif
}

DEVICE void tma_load(unsigned tile, const TensorMap& map, unsigned barrier, int c0, int c1, int c2, int c3,
                     int c4 CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{5, {c0, c1, c2, c3, c4}, false, {}};
  emulator_tma_load(tile, &map, barrier, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
#endif
}

// Loads a column of pixels, with a map made by tensor_map.im2col, for tensors that lie as N [D] [H] W C. The
// coordinates are of the first pixel's window: (c, w, h, d) is the corner of the filter's receptive field, which
// may lie in the padding, and n its image; offsets are the filter tap's (s r t, times the dilation). PTX: the
// corner moves through the map's bounding box in steps of its strides, w fastest, then h, d and n; the pixel
// that is loaded lies the offsets further; what is outside of the tensor is zero. Offsets are at most 2^16 - 1 for
// three dimensions, 255 for four and 31 for five.
DEVICE void tma_load_im2col(unsigned tile, const TensorMap& map, unsigned barrier, int c, int w, int n,
                            unsigned short s CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{3, {c, w, n}, true, {s}};
  emulator_tma_load(tile, &map, barrier, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5}], [%2], {%6};"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(n), "h"(s) : "memory");
#endif
}

DEVICE void tma_load_im2col(unsigned tile, const TensorMap& map, unsigned barrier, int c, int w, int h, int n,
                            unsigned short s, unsigned short r CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{4, {c, w, h, n}, true, {s, r}};
  emulator_tma_load(tile, &map, barrier, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(s), "h"(r) : "memory");
#endif
}

DEVICE void tma_load_im2col(unsigned tile, const TensorMap& map, unsigned barrier, int c, int w, int h, int d, int n,
                            unsigned short s, unsigned short r, unsigned short t CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{5, {c, w, h, d, n}, true, {s, r, t}};
  emulator_tma_load(tile, &map, barrier, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10};"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "h"(s), "h"(r),
               "h"(t) : "memory");
#endif
}

// Multicast: one load for several blocks of a cluster, `ranks` being a mask of them. PTX: each gets the box at the same
// place of its shared memory as `tile` is in the executing thread's, and its mbarrier at the place of `barrier` counts
// the bytes, which it may do before a thread there has expected them. Those blocks must run, and must have given the
// tile free: to this block, by mbarrier_arrive_at.
DEVICE void tma_load_multicast(unsigned tile, const TensorMap& map, unsigned barrier, int c0, int c1, int c2,
                               unsigned short ranks CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{3, {c0, c1, c2}, false, {}};
  emulator_tma_load_multicast(tile, &map, barrier, &box, ranks, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4, %5}], [%2], %6;"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "h"(ranks) : "memory");
#endif
}

DEVICE void tma_load_im2col_multicast(unsigned tile, const TensorMap& map, unsigned barrier, int c, int w, int n,
                                      unsigned short s, unsigned short ranks CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{3, {c, w, n}, true, {s}};
  emulator_tma_load_multicast(tile, &map, barrier, &box, ranks, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4, %5}], [%2], {%6}, %7;"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(n), "h"(s), "h"(ranks) : "memory");
#endif
}

DEVICE void tma_load_im2col_multicast(unsigned tile, const TensorMap& map, unsigned barrier, int c, int w, int h,
                                      int n, unsigned short s, unsigned short r, unsigned short ranks CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{4, {c, w, h, n}, true, {s, r}};
  emulator_tma_load_multicast(tile, &map, barrier, &box, ranks, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(s), "h"(r), "h"(ranks)
               : "memory");
#endif
}

DEVICE void tma_load_im2col_multicast(unsigned tile, const TensorMap& map, unsigned barrier, int c, int w, int h,
                                      int d, int n, unsigned short s, unsigned short r, unsigned short t,
                                      unsigned short ranks CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{5, {c, w, h, d, n}, true, {s, r, t}};
  emulator_tma_load_multicast(tile, &map, barrier, &box, ranks, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster "
               "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], {%8, %9, %10}, %11;"
               ::"r"(tile), "l"(&map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(d), "r"(n), "h"(s), "h"(r),
               "h"(t), "h"(ranks) : "memory");
#endif
}

// Stores one box; what lies outside of the tensor is left out. PTX: one thread executes it and commits it to a
// bulk group of its own. Until bulk_wait_read of that thread covers it, the tile may not be written; memory has
// the data behind bulk_wait, or after the kernel. A block must not end before its tiles have been read.
DEVICE void tma_store(const TensorMap& map, unsigned tile, int c0, int c1 CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{2, {c0, c1}, false, {}};
  emulator_tma_store(&map, tile, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               ::"l"(&map), "r"(tile), "r"(c0), "r"(c1) : "memory");
#endif
}

DEVICE void tma_store(const TensorMap& map, unsigned tile, int c0, int c1, int c2 CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{3, {c0, c1, c2}, false, {}};
  emulator_tma_store(&map, tile, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
               ::"l"(&map), "r"(tile), "r"(c0), "r"(c1), "r"(c2) : "memory");
#endif
}

DEVICE void tma_store(const TensorMap& map, unsigned tile, int c0, int c1, int c2, int c3 CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{4, {c0, c1, c2, c3}, false, {}};
  emulator_tma_store(&map, tile, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(&map), "r"(tile), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
#endif
}

DEVICE void tma_store(const TensorMap& map, unsigned tile, int c0, int c1, int c2, int c3, int c4 CALLER) {
#ifdef EMULATOR
  const EmulatorBox box{5, {c0, c1, c2, c3, c4}, false, {}};
  emulator_tma_store(&map, tile, &box, {file, line});
#else
  asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];"
               ::"l"(&map), "r"(tile), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory");
#endif
}

// The same for plain rows of bytes. PTX: both addresses and `bytes` are multiples of 16.
DEVICE void bulk_load(unsigned shared, const void* global, unsigned bytes, unsigned barrier CALLER) {
#ifdef EMULATOR
  emulator_bulk_load(shared, global, bytes, barrier, {file, line});
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared), "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier) : "memory");
#endif
}

DEVICE void bulk_store(void* global, unsigned shared, unsigned bytes CALLER) {
#ifdef EMULATOR
  emulator_bulk_store(global, shared, bytes, {file, line});
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               ::"l"(__cvta_generic_to_global(global)), "r"(shared), "r"(bytes) : "memory");
#endif
}

// PTX: makes a group of the thread's bulk and TMA stores since its last commit.
DEVICE void bulk_commit() {
#ifdef EMULATOR
  emulator_bulk_commit();
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// PTX: waits until of the executing thread's groups at most the GROUPS newest have not read their shared memory …
template <int GROUPS> DEVICE void bulk_wait_read(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_bulk_wait(GROUPS, true, {file, line});
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(GROUPS) : "memory");
#endif
}

// … or have not written their global memory.
template <int GROUPS> DEVICE void bulk_wait(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_bulk_wait(GROUPS, false, {file, line});
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(GROUPS) : "memory");
#endif
}

// ---- wgmma ----------------------------------------------------------------------------------------------
// D = A B or D += A B by the 128 threads of a warpgroup, which is four warps beginning with a multiple of four.
// D is 64 x N in registers, float; A is 64 x K in shared memory or registers; B is K x N in shared memory; K is
// 32 bytes: 16 elements of half_t and bfloat_t, or 8 of float, which are taken as tf32 (the lower 13 bits do not
// count). PTX, for thread t of the warpgroup, with w = t / 32, g = t % 32 / 4 and q = t % 4:
//
//     d[i]                row 16 w + g + 8 (i / 2 % 2), column 8 (i / 4) + 2 q + i % 2
//     a[i], 16 bits       row 16 w + g + 8 (i % 2), columns 2 q + 8 (i / 2) and one more
//     a[i], tf32          row 16 w + g + 8 (i % 2), column q + 4 (i / 2)
//
// The multiplication runs beside the threads. From its issue until a wgmma_wait that covers it the registers of D
// and A may be neither read nor written, and the shared memory of A and B may not be written; several may follow
// each other on the same D. The rounding of sums inside tensor cores is not modelled by the emulator, which adds
// in float, k = 0, 1, …

// PTX: stands before the first wgmma, and again between any access to its registers and the next wgmma on them.
DEVICE void wgmma_fence(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_wgmma_fence({file, line});
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// PTX: makes a group of the wgmma since the last commit.
DEVICE void wgmma_commit(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_wgmma_commit({file, line});
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// PTX: waits until at most the GROUPS newest groups are under way.
template <int GROUPS> DEVICE void wgmma_wait(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_wgmma_wait(GROUPS, {file, line});
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#endif
}

// Keeps the compiler from moving accesses to registers of a wgmma across this point: it knows what an asm reads
// and writes, but not that a wgmma goes on after it. Stands behind the wait, and before the fence.
template <int R> DEVICE void wgmma_pin(float (&d)[R]) {
#ifndef EMULATOR
#pragma unroll
  for (int i = 0; i < R; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// Which dimension of A or B is contiguous in shared memory. MN_MAJOR is for elements of 16 bits only.
enum Major { K_MAJOR, MN_MAJOR };

// Describes where A or B lies: `tile` is its first element; all numbers are multiples of 16. The unit is the piece
// of 16 bytes: 8 elements of 16 bits or 4 of 32, along the contiguous dimension. `width` is the swizzle's, or 16
// bytes without one.
//
//     K_MAJOR    8 rows of `width` bytes follow each other; the next 8 rows lie `stride_bytes` further. The second
//                piece of a row follows the first, or without a swizzle lies `leading_bytes` further.
//     MN_MAJOR   8 lines (of one k each) of `width` bytes follow each other. With a swizzle, the next 8 k lie
//                `stride_bytes` further, the next `width` bytes along M or N `leading_bytes`; without, it is the
//                other way round.
//
// PTX: bits 0-13, 16-29 and 32-45 hold the three numbers over 16; 62-63 the swizzle: 1 128B, 2 64B, 3 32B. Bits
// 49-51, the base offset, are zero here: the pattern begins at a multiple of 1024, 512 or 256 bytes.
// To go on along K by 32 bytes (K_MAJOR) or 16 lines (MN_MAJOR), describe a tile that begins so much further.
DEVICE unsigned long long wgmma_descriptor(unsigned tile, unsigned leading_bytes, unsigned stride_bytes,
                                           Swizzle swizzle CALLER) {
#ifdef EMULATOR
  if ((tile | leading_bytes | stride_bytes) % 16)
    emulator_trap("misaligned: wgmma_descriptor: expected multiples of 16", {file, line});
#endif
  const unsigned mode = swizzle == SWIZZLE_NONE ? 0 : 4 - swizzle;
  const unsigned low = (tile & 0x3ffff) >> 4 | (leading_bytes & 0x3ffff) >> 4 << 16;
  const unsigned high = (stride_bytes & 0x3ffff) >> 4 | mode << 30;
  return (unsigned long long)high << 32 | low;
}

// How the asm and the emulator tell the element types apart.
enum WgmmaType { WGMMA_F16, WGMMA_BF16, WGMMA_TF32 };
DEVICE constexpr WgmmaType wgmma_type(half_t) { return WGMMA_F16; }
DEVICE constexpr WgmmaType wgmma_type(bfloat_t) { return WGMMA_BF16; }
DEVICE constexpr WgmmaType wgmma_type(float) { return WGMMA_TF32; }

#ifndef EMULATOR
// The asm statement has a register list for each N, so there is a specialisation for each N in use. Another
// multiple of 8 needs lists of N / 2 registers and a line in the table below.
template <int N> struct Wgmma;

// "%0, %1, …" and "+f"(d[0]), "+f"(d[1]), … of 4 to 128 registers.
#define WGMMA_LIST_4 "%0, %1, %2, %3"
#define WGMMA_LIST_16 WGMMA_LIST_4 ", %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_LIST_32 WGMMA_LIST_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_LIST_48 WGMMA_LIST_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_LIST_64 WGMMA_LIST_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_LIST_80 WGMMA_LIST_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_LIST_96 WGMMA_LIST_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_LIST_112 WGMMA_LIST_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_LIST_128 WGMMA_LIST_112 \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_LIST_8 WGMMA_LIST_4 ", %4, %5, %6, %7"
#define WGMMA_OUT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_OUT_16_FROM(i) WGMMA_OUT(i), WGMMA_OUT(i + 4), WGMMA_OUT(i + 8), WGMMA_OUT(i + 12)
#define WGMMA_OUT_4 WGMMA_OUT(0)
#define WGMMA_OUT_8 WGMMA_OUT(0), WGMMA_OUT(4)
#define WGMMA_OUT_16 WGMMA_OUT_16_FROM(0)
#define WGMMA_OUT_32 WGMMA_OUT_16, WGMMA_OUT_16_FROM(16)
#define WGMMA_OUT_48 WGMMA_OUT_32, WGMMA_OUT_16_FROM(32)
#define WGMMA_OUT_64 WGMMA_OUT_48, WGMMA_OUT_16_FROM(48)
#define WGMMA_OUT_80 WGMMA_OUT_64, WGMMA_OUT_16_FROM(64)
#define WGMMA_OUT_96 WGMMA_OUT_80, WGMMA_OUT_16_FROM(80)
#define WGMMA_OUT_112 WGMMA_OUT_96, WGMMA_OUT_16_FROM(96)
#define WGMMA_OUT_128 WGMMA_OUT_112, WGMMA_OUT_16_FROM(112)

// `shape` is "k16.f32.f16.f16" or the like, `operands` A and B; D is scaled by `accumulate`, A and B by 1; whether
// A and B are MN_MAJOR follows in `majors`. Then the asm's inputs.
#define WGMMA_ASM(N, R, shape, operands, accumulate, majors, ...)                                              \
  asm volatile("{\n"                                                                                           \
               ".reg .pred accumulate;\n"                                                                      \
               "setp.ne.b32 accumulate, " accumulate ", 0;\n"                                                  \
               "wgmma.mma_async.sync.aligned.m64n" #N shape " {" WGMMA_LIST_##R "}, " operands                 \
               ", accumulate, 1, 1" majors ";\n"                                                               \
               "}" : WGMMA_OUT_##R : __VA_ARGS__)
#define WGMMA_A_INPUTS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

// p0 to p6 are the numbers of the inputs, which follow the R registers of D.
#define WGMMA_FOR(N, R, p0, p1, p2, p3, p4, p5, p6)                                                            \
  template <> struct Wgmma<N> {                                                                                \
    template <WgmmaType T, Major A, Major B>                                                                   \
    DEVICE void issue(float (&d)[R], unsigned long long a, unsigned long long b, int accumulate) {             \
      if constexpr (T == WGMMA_F16)                                                                            \
        WGMMA_ASM(N, R, "k16.f32.f16.f16", p0 ", " p1, p2, ", " p3 ", " p4,                                    \
                  "l"(a), "l"(b), "r"(accumulate), "n"((int)A), "n"((int)B));                                  \
      else if constexpr (T == WGMMA_BF16)                                                                      \
        WGMMA_ASM(N, R, "k16.f32.bf16.bf16", p0 ", " p1, p2, ", " p3 ", " p4,                                  \
                  "l"(a), "l"(b), "r"(accumulate), "n"((int)A), "n"((int)B));                                  \
      else                                                                                                     \
        WGMMA_ASM(N, R, "k8.f32.tf32.tf32", p0 ", " p1, p2, "", "l"(a), "l"(b), "r"(accumulate));              \
    }                                                                                                          \
    template <WgmmaType T, Major B>                                                                            \
    DEVICE void issue(float (&d)[R], const unsigned (&a)[4], unsigned long long b, int accumulate) {           \
      if constexpr (T == WGMMA_F16)                                                                            \
        WGMMA_ASM(N, R, "k16.f32.f16.f16", "{" p0 ", " p1 ", " p2 ", " p3 "}, " p4, p5, ", " p6,               \
                  WGMMA_A_INPUTS, "l"(b), "r"(accumulate), "n"((int)B));                                       \
      else if constexpr (T == WGMMA_BF16)                                                                      \
        WGMMA_ASM(N, R, "k16.f32.bf16.bf16", "{" p0 ", " p1 ", " p2 ", " p3 "}, " p4, p5, ", " p6,             \
                  WGMMA_A_INPUTS, "l"(b), "r"(accumulate), "n"((int)B));                                       \
      else                                                                                                     \
        WGMMA_ASM(N, R, "k8.f32.tf32.tf32", "{" p0 ", " p1 ", " p2 ", " p3 "}, " p4, p5, "",                   \
                  WGMMA_A_INPUTS, "l"(b), "r"(accumulate));                                                    \
    }                                                                                                          \
  };

WGMMA_FOR(8, 4, "%4", "%5", "%6", "%7", "%8", "%9", "%10")
WGMMA_FOR(16, 8, "%8", "%9", "%10", "%11", "%12", "%13", "%14")
WGMMA_FOR(32, 16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
WGMMA_FOR(64, 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
WGMMA_FOR(96, 48, "%48", "%49", "%50", "%51", "%52", "%53", "%54")
WGMMA_FOR(128, 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
WGMMA_FOR(160, 80, "%80", "%81", "%82", "%83", "%84", "%85", "%86")
WGMMA_FOR(192, 96, "%96", "%97", "%98", "%99", "%100", "%101", "%102")
WGMMA_FOR(256, 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")
#endif

// Issues D (+)= A B for T = half_t, bfloat_t or float (tf32), N = 2 R columns, A and B by descriptor …
template <class T, Major A = K_MAJOR, Major B = K_MAJOR, int R>
DEVICE void wgmma(float (&d)[R], unsigned long long a, unsigned long long b, bool accumulate CALLER) {
  static_assert(sizeof(T) == 2 || (A == K_MAJOR && B == K_MAJOR), "tf32 is K-major only");
#ifdef EMULATOR
  const EmulatorWgmma operands{wgmma_type(T()), 2 * R, d, nullptr, a, b, A, B, accumulate};
  emulator_wgmma(&operands, {file, line});
#else
  Wgmma<2 * R>::template issue<wgmma_type(T()), A, B>(d, a, b, accumulate);
#endif
}

// … or A in registers, K-major.
template <class T, Major B = K_MAJOR, int R>
DEVICE void wgmma(float (&d)[R], const unsigned (&a)[4], unsigned long long b, bool accumulate CALLER) {
  static_assert(sizeof(T) == 2 || B == K_MAJOR, "tf32 is K-major only");
#ifdef EMULATOR
  const EmulatorWgmma operands{wgmma_type(T()), 2 * R, d, a, 0, b, K_MAJOR, B, accumulate};
  emulator_wgmma(&operands, {file, line});
#else
  Wgmma<2 * R>::template issue<wgmma_type(T()), B>(d, a, b, accumulate);
#endif
}

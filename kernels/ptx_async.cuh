// Copies that run beside the threads, and barriers of part of a block: sm_80 and up. As in ptx.cuh, each wrapper
// holds its device body (PTX) and its emulator body side by side; addresses of shared memory are those of
// shared_address(). The emulator does asynchronous work as late as the rules below allow, and until then the
// target holds NaN: a kernel that does not wait long enough fails there each time, not once in a while.
#pragma once
#include "ptx.cuh"

#ifdef EMULATOR
#define CALLER_ALONE EMULATOR_CALLER  // CALLER, where there are no other parameters
#else
#define CALLER_ALONE
#endif

// ---- cp.async: global to shared memory, 4, 8 or 16 bytes a thread ---------------------------------------
// PTX: both addresses are multiples of BYTES. The first `source_bytes` (0 to BYTES) are copied and the rest of
// the target is filled with zeros; with 0 the source is not touched at all. The copy is part of the generic
// proxy, but it is done in no order with the thread's other accesses: until a wait of the same thread covers it,
// the target may be neither read nor written, and the source may not be written. 16 bytes go past L1 (.cg),
// which is right for what a block reads once; for what it reads AGAIN they are kept there (.ca), as 4 and 8 are.
template <int BYTES, bool AGAIN = false>
DEVICE void cp_async(unsigned shared, const void* global, unsigned source_bytes = BYTES CALLER) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef EMULATOR
  emulator_cp_async(shared, global, BYTES, source_bytes, {file, line});
#else
  const size_t source = __cvta_generic_to_global(global);
  if constexpr (BYTES == 16 && !AGAIN)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(source), "r"(source_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(source), "n"(BYTES),
                 "r"(source_bytes) : "memory");
#endif
}

// PTX: makes a group of the thread's copies since its last commit; the group may be empty.
DEVICE void cp_async_commit() {
#ifdef EMULATOR
  emulator_cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// PTX: waits until at most the PENDING newest groups of the executing thread are under way. Other threads see the
// data only behind a barrier that follows the wait.
template <int PENDING> DEVICE void cp_async_wait(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_cp_async_wait(PENDING, {file, line});
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// PTX: waits for all copies of the executing thread, committed or not.
DEVICE void cp_async_wait_all(CALLER_ALONE) {
#ifdef EMULATOR
  emulator_cp_async_wait(-1, {file, line});
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- named barriers -------------------------------------------------------------------------------------
// PTX: a block has 16 barriers, of which __syncthreads() is number 0: `id` is 1 to 15. `threads` is a multiple of
// 32, the same for all who take part, and counts those that wait (sync) and those that only arrive. All lanes of
// a warp execute the instruction together. What a thread did before it arrived is seen by those that waited.
DEVICE void bar_sync(unsigned id, unsigned threads CALLER) {
#ifdef EMULATOR
  emulator_named_barrier(id, threads, true, {file, line});
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

DEVICE void bar_arrive(unsigned id, unsigned threads CALLER) {
#ifdef EMULATOR
  emulator_named_barrier(id, threads, false, {file, line});
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// The calls between a compiled kernel file and the emulator's runtime library. Plain C, no other header,
// because every kernel file reads it.
#pragma once

#pragma GCC visibility push(default)
extern "C" {

// Where a call stands in the source.
struct EmulatorPlace {
  const char* file;
  int line;
};

// Indices of the running thread and sizes of the launch, packed as x | y << 31 | z << 47 (CUDA's own limits
// are 31, 16 and 16 bits). `const`: within one thread they never change, so the compiler may call once.
__attribute__((const)) unsigned long emulator_thread_index();
__attribute__((const)) unsigned long emulator_block_index();
__attribute__((const)) unsigned long emulator_block_size();
__attribute__((const)) unsigned long emulator_grid_size();

// Waits for every thread of the block; returns how many of them passed a non-zero `predicate`.
int emulator_block_barrier(int predicate, EmulatorPlace place);

// Warp-wide operations. All lanes of `mask` must arrive at the same operation in the same source line.
enum EmulatorShuffle { EMULATOR_SHUFFLE_INDEX, EMULATOR_SHUFFLE_UP, EMULATOR_SHUFFLE_DOWN, EMULATOR_SHUFFLE_XOR };
unsigned long emulator_shuffle(EmulatorShuffle kind, unsigned mask, unsigned long value, int lane, int width,
                               EmulatorPlace place);
unsigned emulator_ballot(unsigned mask, int predicate, EmulatorPlace place);
void emulator_warp_barrier(unsigned mask, EmulatorPlace place);
unsigned emulator_active_mask();

// The address of a shared variable in the running thread's block. Takes the place of __tls_get_addr in a compiled
// kernel file, where shared variables are thread-local ones.
struct EmulatorSharedVariable {
  unsigned long module, offset;
};
void* emulator_shared_variable(const EmulatorSharedVariable* variable);

// Announces an atomic read-modify-write of `bytes` at `address`, made by the code at `pc`.
void emulator_atomic(const void* address, unsigned bytes, const void* pc);

// Instructions on matrices: see kernels/ptx.cuh. All lanes of the warp must arrive in the same source line.
// A shared address is the offset in the module's shared memory.
enum EmulatorMma { EMULATOR_MMA_F16, EMULATOR_MMA_BF16, EMULATOR_MMA_TF32 };
unsigned emulator_shared_address(const void* pointer, EmulatorPlace place);
void emulator_ldmatrix(unsigned* registers, int count, bool transposed, unsigned row, EmulatorPlace place);
void emulator_stmatrix(const unsigned* registers, int count, bool transposed, unsigned row,
                       EmulatorPlace place);
void emulator_mma(EmulatorMma kind, float* d, const unsigned* a, const unsigned* b, EmulatorPlace place);
void emulator_mma_f64(double* d, double a, double b, EmulatorPlace place);

void emulator_prefetch(const void* address);

// Asynchronous copies and barriers: see kernels/ptx_async.cuh and kernels/ptx_sm90.cuh.
void emulator_cp_async(unsigned shared, const void* global, unsigned bytes, unsigned source_bytes,
                       EmulatorPlace place);
void emulator_cp_async_commit();
void emulator_cp_async_wait(int groups, EmulatorPlace place);  // -1: for all, committed or not
void emulator_named_barrier(unsigned id, unsigned threads, bool waits, EmulatorPlace place);

void emulator_fence_proxy_async();
void emulator_fence_mbarrier_init();
void emulator_mbarrier_init(unsigned barrier, unsigned count, EmulatorPlace place);
void emulator_mbarrier_inval(unsigned barrier, EmulatorPlace place);
void emulator_mbarrier_arrive(unsigned barrier, unsigned expected_bytes, EmulatorPlace place);
void emulator_mbarrier_arrive_at(unsigned barrier, unsigned rank, EmulatorPlace place);
bool emulator_mbarrier_try_wait(unsigned barrier, unsigned parity, EmulatorPlace place);

struct EmulatorBox {
  int rank;
  int at[5];  // coordinates, innermost first
  bool im2col;
  unsigned short offsets[3];  // im2col: w, h, d
};
void emulator_tma_prefetch(const void* map, EmulatorPlace place);
void emulator_tma_load(unsigned tile, const void* map, unsigned barrier, const EmulatorBox* box, EmulatorPlace place);
void emulator_tma_load_multicast(unsigned tile, const void* map, unsigned barrier, const EmulatorBox* box,
                                 unsigned ranks, EmulatorPlace place);
void emulator_tma_store(const void* map, unsigned tile, const EmulatorBox* box, EmulatorPlace place);
void emulator_bulk_load(unsigned shared, const void* global, unsigned bytes, unsigned barrier, EmulatorPlace place);
void emulator_bulk_store(void* global, unsigned shared, unsigned bytes, EmulatorPlace place);
void emulator_bulk_commit();
void emulator_bulk_wait(int groups, bool for_reads_only, EmulatorPlace place);

// Clusters of blocks: see kernels/ptx_cluster.cuh. `shared` points into the caller's own shared memory.
__attribute__((const)) unsigned emulator_cluster_rank();
__attribute__((const)) unsigned emulator_cluster_blocks();
void emulator_cluster_arrive(EmulatorPlace place);
void emulator_cluster_wait(EmulatorPlace place);
void emulator_cluster_load(void* value, const void* shared, unsigned rank, unsigned bytes, EmulatorPlace place);
void emulator_cluster_store(const void* value, void* shared, unsigned rank, unsigned bytes, EmulatorPlace place);

// Warpgroups.
struct EmulatorWgmma {
  int type;  // WgmmaType
  int n;
  float* d;
  const unsigned* a_registers;  // null: A is in shared memory
  unsigned long long a, b;      // descriptors
  int a_major, b_major;         // Major
  bool accumulate;
};
void emulator_wgmma(const EmulatorWgmma* operands, EmulatorPlace place);
void emulator_wgmma_fence(EmulatorPlace place);
void emulator_wgmma_commit(EmulatorPlace place);
void emulator_wgmma_wait(int groups, EmulatorPlace place);
void emulator_setmaxnreg(unsigned count, EmulatorPlace place);
bool emulator_elect(unsigned mask, EmulatorPlace place);

// The kernel gives up: __trap() and a failed assert().
[[noreturn]] void emulator_trap(const char* what, EmulatorPlace place);

// What an entry expects, so that a launch with other arguments is refused instead of misread.
struct EmulatorParameter {
  unsigned bytes;          // of the parameter itself
  unsigned pointee_bytes;  // 0: not a pointer
  unsigned pointee_const;
};
struct EmulatorSignature {
  unsigned count;
  unsigned max_threads;  // from __launch_bounds__; 0: none stated
  unsigned cluster;      // from __cluster_dims__; 0: none stated
  EmulatorParameter parameter[32];
};
}
#pragma GCC visibility pop

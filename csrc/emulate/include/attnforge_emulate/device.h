// What csrc/cuda/ptx/ calls under the emulator, one function per instruction.
//
// All of them act for the running fiber, that is for one thread of one block, and throw Error where
// the hardware would give garbage, hang, or be right by luck.
#pragma once

#include <cstdint>
#include <source_location>

namespace attnforge::emulate {

using Site = std::source_location;

// Numbers.
uint16_t bf16_bits(float x);  // to nearest even
uint16_t f16_bits(float x);   // to nearest even
float f16_value(uint16_t bits);
uint32_t tf32_bits(float x);  // to nearest, ties away from zero
uint32_t e4m3_bits(float x);  // to nearest even, saturating at 448
float e4m3_value(uint32_t bits);
float exp2(float x);
float log2(float x);
float reciprocal(float x);
float tanh(float x);
float fma(float a, float b, float c);
float max(float a, float b);
float sqrt(float x);

// Memory.
uint32_t dynamic_shared_memory();
void load_shared(void* to, uint32_t address, uint32_t bytes, Site site);
void store_shared(uint32_t address, const void* from, uint32_t bytes, Site site);
void add_shared(uint32_t address, float value, Site site);
uint32_t fetch_add_shared(uint32_t address, uint32_t value, Site site);
uint32_t fetch_or_shared(uint32_t address, uint32_t bits, Site site);
void add_global(float* address, float value, Site site);
uint32_t fetch_add_global(uint32_t* address, uint32_t value, Site site);
uint32_t load_acquire_global(const uint32_t* address, Site site);
void store_release_global(uint32_t* address, uint32_t value, Site site);

// Barriers.
void sync_threads(Site site);
void named_barrier(uint32_t id, uint32_t threads, bool wait, Site site);
void sync_warp(uint32_t mask, Site site);

// Warp.
enum class Shuffle { kXor, kFrom, kUp, kDown };
uint32_t lane_id();
void shuffle(Shuffle kind, void* value, uint32_t operand, uint32_t mask, Site site);  // 4 bytes
uint32_t ballot(bool predicate, uint32_t mask, Site site);
bool elect_one(Site site);

// Copies that land late.
void cp_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t source_bytes,
              Site site);
void cp_async_commit(Site site);
void cp_async_wait(int pending_groups, Site site);

// Matrices.
enum class Operand { kBf16, kF16, kTf32, kE4m3 };
void ldmatrix(uint32_t* to, int matrices, bool transposed, uint32_t row_address, Site site);
void stmatrix(const uint32_t* from, int matrices, bool transposed, uint32_t row_address, Site site);
void mma(Operand operand, float* d, const uint32_t* a, const uint32_t* b, Site site);

// mbarriers, and copies that complete on them.
void mbarrier_init(uint32_t address, uint32_t count, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_invalidate(uint32_t address, Site site);
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Site site);
bool mbarrier_try_wait(uint32_t address, uint32_t parity, Site site);
void cp_async_mbarrier_arrive(uint32_t address, Site site);
void fence_proxy_async(Site site);
void tma_load(uint32_t shared, const uint64_t* map, uint32_t barrier, const int32_t* at, int rank,
              Site site);
void tma_store(const uint64_t* map, uint32_t shared, const int32_t* at, int rank, bool add,
               Site site);
void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, Site site);
void bulk_commit(Site site);
void bulk_wait(int pending_groups, Site site);

// Products of a warpgroup.
struct Product {
  Operand operand;
  int n;
  bool mn_major_a, mn_major_b;
};
void wgmma_fence(Site site);
void wgmma(const Product& product, float* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, bool add, Site site);  // a: null where A is in shared memory
void wgmma_commit(Site site);
void wgmma_wait(int pending_groups, Site site);
void set_registers(int count, bool raise, Site site);

}  // namespace attnforge::emulate

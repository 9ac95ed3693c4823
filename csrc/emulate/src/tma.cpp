// TMA: boxes of tensors between global and shared memory, swizzled; csrc/cuda/tensor_map.h has the
// map.
//
// A load reads global memory when it lands, which the scheduler puts off. A store reads shared
// memory and writes global memory when its group is waited for.
#include <cstring>

#include "machine.h"

namespace attnforge::emulate {

Mbarrier& mbarrier_at(uint32_t address, const char* what, bool by_copy, const Site& site);
void land_bytes(Block& block, Mbarrier& barrier, uint32_t bytes);

namespace {

constexpr uint32_t kMark = 0x746d6170;  // a map that make_tensor_map wrote

struct Map {
  unsigned char* base;
  uint64_t stride[5];  // bytes
  uint32_t last[5];    // extent - 1
  uint16_t box[5];
  uint8_t rank, element_bytes, fp32, swizzle;
  uint32_t mark;

  uint32_t row_bytes() const { return uint32_t{box[0]} * element_bytes; }
  uint32_t rows() const {
    uint32_t n = 1;
    for (int d = 1; d < rank; ++d) n *= box[d];
    return n;
  }
};
static_assert(sizeof(Map) <= 128);

Map read_map(const uint64_t* opaque, int rank, const Site& site) {
  Map map;
  std::memcpy(&map, opaque, sizeof(map));
  if (map.mark != kMark) fail(site, "a tensor map that make_tensor_map has not written");
  if (map.rank != rank) {
    fail(site, "a copy of rank " + std::to_string(rank) + " with a tensor map of rank " +
                   std::to_string(map.rank));
  }
  return map;
}

// Calls element(shared offset, global address or null) for each element of the box; null is
// outside.
template <typename Element>
void for_box(const Map& map, const std::array<int32_t, 5>& at, uint32_t offset, Element element) {
  const uint32_t mask = (1u << map.swizzle) - 1;
  uint32_t linear = kSharedBase + offset;
  for (uint32_t row = 0, rows = map.rows(); row < rows; ++row) {
    unsigned char* start = map.base;
    bool inside = true;
    for (uint32_t d = 1, rest = row; d < map.rank; ++d) {
      const int64_t i = int64_t{at[d]} + rest % map.box[d];
      rest /= map.box[d];
      inside &= i >= 0 && i <= map.last[d];
      if (inside) start += static_cast<uint64_t>(i) * map.stride[d];
    }
    for (uint32_t column = 0; column < map.box[0]; ++column, linear += map.element_bytes) {
      const int64_t i = int64_t{at[0]} + column;
      const uint32_t swizzled = linear ^ (linear >> 7 & mask) << 4;
      const bool here = inside && i >= 0 && i <= map.last[0];
      element(swizzled - kSharedBase, here ? start + i * map.element_bytes : nullptr);
    }
  }
}

uint32_t box_offset(const Map& map, uint32_t address, const Site& site) {
  const uint32_t bytes = map.row_bytes() * map.rows();
  const uint32_t offset = machine().shared_offset(address, bytes, 128, site);
  if (map.swizzle && bytes % 128) {
    fail(site, "a swizzled box of " + std::to_string(bytes) + " bytes is no multiple of 128");
  }
  return offset;
}

std::array<int32_t, 5> coordinates(const int32_t* at, int rank) {
  std::array<int32_t, 5> all{};
  std::copy_n(at, rank, all.begin());
  return all;
}

void store_box(Block& block, const Store& store) {
  Map map;
  std::memcpy(&map, store.map.data(), sizeof(map));
  for_box(map, store.at, store.offset, [&](uint32_t offset, unsigned char* global) {
    if (!global) return;
    const unsigned char* from = block.shared.data() + offset;
    if (!store.add) {
      std::memcpy(global, from, map.element_bytes);
      return;
    }
    float sum, value;
    std::memcpy(&sum, global, 4);
    std::memcpy(&value, from, 4);
    sum += value;
    std::memcpy(global, &sum, 4);
  });
}

}  // namespace

void encode_tensor_map(uint64_t (&opaque)[16], const TensorFields& fields) {
  const auto refuse = [](const std::string& cause) {
    throw Error("attnforge emulator: make_tensor_map: " + cause);
  };
  Map map{};
  if (fields.rank < 2 || fields.rank > 5) {
    refuse("rank " + std::to_string(fields.rank) + "; 2 to 5 is possible");
  }
  if (reinterpret_cast<uintptr_t>(fields.base) % 16) refuse("the base is not 16-byte aligned");
  map.base = static_cast<unsigned char*>(const_cast<void*>(fields.base));
  map.rank = static_cast<uint8_t>(fields.rank);
  map.element_bytes = static_cast<uint8_t>(fields.element_bytes);
  map.fp32 = fields.fp32;
  map.swizzle = static_cast<uint8_t>(fields.swizzle);
  map.mark = kMark;
  for (uint32_t d = 0; d < fields.rank; ++d) {
    const std::string where = " of dimension " + std::to_string(d);
    if (fields.extent[d] == 0 || fields.extent[d] > uint64_t{1} << 32) {
      refuse("extent " + std::to_string(fields.extent[d]) + where + "; 1 to 2^32 is possible");
    }
    if (fields.box[d] == 0 || fields.box[d] > 256) {
      refuse("box " + std::to_string(fields.box[d]) + where + "; 1 to 256 is possible");
    }
    if (d > 0 && (fields.stride[d] % 16 || fields.stride[d] >= uint64_t{1} << 40)) {
      refuse("stride " + std::to_string(fields.stride[d]) + where +
             "; multiples of 16 below 2^40 are possible");
    }
    map.last[d] = static_cast<uint32_t>(fields.extent[d] - 1);
    map.stride[d] = fields.stride[d];
    map.box[d] = static_cast<uint16_t>(fields.box[d]);
  }
  const uint32_t row = map.row_bytes();
  if (row % 16) refuse("box[0] has " + std::to_string(row) + " bytes; a multiple of 16 is needed");
  if (map.swizzle && row > 16u << map.swizzle) {
    refuse("box[0] has " + std::to_string(row) + " bytes, and the swizzle spans " +
           std::to_string(16u << map.swizzle));
  }
  std::memset(opaque, 0, sizeof(opaque));
  std::memcpy(opaque, &map, sizeof(map));
}

void tma_load(uint32_t shared, const uint64_t* opaque, uint32_t address, const int32_t* at,
              int rank, Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  const Map map = read_map(opaque, rank, site);
  const uint32_t offset = box_offset(map, shared, site);
  const uint32_t bytes = map.row_bytes() * map.rows();
  Mbarrier& barrier = mbarrier_at(address, "a bulk load", true, site);
  Block* block = &m.block();
  block->shadow.write(offset, bytes, m.access(site, Proxy::kAsync), Written::kBulk);
  ++barrier.copies;
  m.start({block,
           [=, &barrier, from = coordinates(at, rank)] {
             for_box(map, from, offset, [&](uint32_t to, const unsigned char* global) {
               unsigned char* element = block->shared.data() + to;
               std::memset(element, 0, map.element_bytes);
               if (global) std::memcpy(element, global, map.element_bytes);
             });
             block->shadow.land(offset, bytes, barrier.agent, barrier.phase + 1, Written::kAsync);
             land_bytes(*block, barrier, bytes);
           },
           site});
}

void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t address, Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  if (bytes == 0 || bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16) {
    fail(site, "bulk_load: size and addresses are multiples of 16, and the size is not 0");
  }
  const uint32_t offset = m.shared_offset(shared, bytes, 16, site);
  Mbarrier& barrier = mbarrier_at(address, "a bulk load", true, site);
  Block* block = &m.block();
  block->shadow.write(offset, bytes, m.access(site, Proxy::kAsync), Written::kBulk);
  ++barrier.copies;
  m.start({block,
           [=, &barrier] {
             std::memcpy(block->shared.data() + offset, global, bytes);
             block->shadow.land(offset, bytes, barrier.agent, barrier.phase + 1, Written::kAsync);
             land_bytes(*block, barrier, bytes);
           },
           site});
}

void tma_store(const uint64_t* opaque, uint32_t shared, const int32_t* at, int rank, bool add,
               Site site) {
  Machine& m = machine();
  m.maybe_preempt();
  const Map map = read_map(opaque, rank, site);
  if (add && !map.fp32) fail(site, "tma_add to a tensor that is not fp32");
  Store store{
      {},  coordinates(at, rank), box_offset(map, shared, site), map.row_bytes() * map.rows(), add,
      site};
  std::copy_n(opaque, 16, store.map.begin());
  m.block().shadow.begin_pending_read(store.offset, store.bytes, m.access(site, Proxy::kAsync));
  m.current().open_stores.push_back(store);
}

void bulk_commit(Site) {
  Thread& me = machine().current();
  me.store_groups.push_back(std::move(me.open_stores));
  me.open_stores.clear();
}

void bulk_wait(int pending_groups, Site) {
  Machine& m = machine();
  m.maybe_preempt();
  Thread& me = m.current();
  while (me.store_groups.size() > static_cast<size_t>(pending_groups)) {
    for (const Store& store : me.store_groups.front()) {
      store_box(*me.block, store);
      me.block->shadow.end_pending_read(store.offset, store.bytes, m.access(store.site));
    }
    me.store_groups.pop_front();
  }
}

}  // namespace attnforge::emulate

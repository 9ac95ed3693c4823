// wgmma: products of a warpgroup, in flight from issue to wait; csrc/cuda/ptx/wgmma.h has the
// layouts.
//
// Each warp's rows are computed when the warp waits: shared memory is read then, and the
// accumulators hold a NaN until then. That they hold it still is checked.
#include <cstring>

#include "machine.h"

namespace attnforge::emulate {
namespace {

constexpr uint32_t kPoison = 0x7fbadbad;  // a NaN that no arithmetic gives

struct Descriptor {
  uint32_t start, leading, stride, width;  // bytes; width of the swizzle, 16 without
  uint32_t mask;

  explicit Descriptor(uint64_t bits) {
    start = static_cast<uint32_t>(bits & 0x3fff) << 4;
    leading = static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4;
    stride = static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4;
    const auto mode = static_cast<uint32_t>(bits >> 62);
    width = mode == 0 ? 16 : 256u >> mode;
    mask = width / 16 - 1;
  }
  uint32_t swizzled(uint32_t address) const { return address ^ (address >> 7 & mask) << 4; }

  // 16 bytes of row `mn`: k in the first or second half of the product's 32 bytes.
  uint32_t k_major(uint32_t mn, uint32_t half) const {
    return swizzled(start + mn % 8 * width + mn / 8 * stride + half * (mask ? 16 : leading));
  }
  // 16 bytes of row `k`: eight 16-bit elements from 8 `chunk` on.
  uint32_t mn_major(uint32_t k, uint32_t chunk) const {
    const uint32_t across =
        mask ? chunk % (width / 16) * 16 + chunk / (width / 16) * leading : chunk * stride;
    return swizzled(start + across + k % 8 * width + k / 8 * (mask ? stride : leading));
  }
};

// Offsets of the operand's 16-byte chunks, for rows first..first + rows - 1.
std::vector<uint32_t> chunks_of(uint64_t bits, bool mn_major, uint32_t first, uint32_t rows,
                                const char* name, const Site& site) {
  const Descriptor descriptor(bits);
  const std::string of = std::string("wgmma: the descriptor of ") + name;
  if (bits >> 49 & 7) fail(site, of + " has a base offset; tiles start at the swizzle's period");
  if (descriptor.mask && descriptor.start % (8 * descriptor.width) >= descriptor.width) {
    fail(site, of + " starts at byte " + std::to_string(descriptor.start - kSharedBase) +
                   ", which is not in the first row of a swizzle's period of " +
                   std::to_string(8 * descriptor.width) + " bytes");
  }
  std::vector<uint32_t> chunks;
  if (mn_major) {
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t chunk = first / 8; chunk < (first + rows) / 8; ++chunk) {
        chunks.push_back(descriptor.mn_major(k, chunk));
      }
    }
  } else {
    for (uint32_t mn = first; mn < first + rows; ++mn) {
      for (uint32_t half = 0; half < 2; ++half) chunks.push_back(descriptor.k_major(mn, half));
    }
  }
  for (uint32_t& chunk : chunks) chunk = machine().shared_offset(chunk, 16, 16, site);
  return chunks;
}

int elements_per_word(Operand operand) {
  return operand == Operand::kE4m3 ? 4 : 2;
}

// [rows, K] from the chunks that chunks_of listed.
std::vector<float> gather(const Block& block, Operand operand, bool mn_major, uint32_t rows,
                          const std::vector<uint32_t>& chunks) {
  const int per = elements_per_word(operand);
  const uint32_t depth = 8 * per;
  std::vector<float> matrix(rows * depth);
  size_t next = 0;
  const auto element = [&](uint32_t i) {  // of the current chunk
    uint32_t word;
    std::memcpy(&word, block.shared.data() + chunks[next] + i / per * 4, 4);
    return element_value(operand, word, static_cast<int>(i % per));
  };
  if (mn_major) {
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t chunk = 0; chunk < rows / 8; ++chunk, ++next) {
        for (uint32_t i = 0; i < 8; ++i) matrix[(chunk * 8 + i) * depth + k] = element(i);
      }
    }
  } else {
    for (uint32_t mn = 0; mn < rows; ++mn) {
      for (uint32_t half = 0; half < 2; ++half, ++next) {
        for (uint32_t i = 0; i < depth / 2; ++i) {
          matrix[mn * depth + half * (depth / 2) + i] = element(i);
        }
      }
    }
  }
  return matrix;
}

// What the lanes of the warp know together: the instruction is issued once all have come.
Clock joined(const Block& block, uint32_t warp) {
  Clock all = block.threads[warp * 32].clock;
  for (uint32_t lane = 1; lane < 32; ++lane) all.join(block.threads[warp * 32 + lane].clock);
  return all;
}

void check_group(const char* what, const Site& site) {
  Machine& m = machine();
  if (m.current().warp() / 4 * 128 + 128 > m.threads()) {
    fail(site, std::string(what) + ": the warp belongs to no whole warpgroup of 128 threads");
  }
}

struct Argument {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool add;
};

// Products of one warp, in order: into the held accumulators, and at the last one into registers.
void complete(Block& block, TensorCore& core, const WarpProduct& work) {
  const Product& product = work.product;
  const auto n = static_cast<uint32_t>(product.n);
  const int per = elements_per_word(product.operand);
  const uint32_t depth = 8 * per;
  const std::vector<float> b = gather(block, product.operand, product.mn_major_b, n, work.b_chunks);
  std::vector<float> a;
  if (work.a_shared) {
    a = gather(block, product.operand, product.mn_major_a, 16, work.a_chunks);
  } else {
    a.resize(16 * depth);
    for (uint32_t lane = 0; lane < 32; ++lane) {
      for (uint32_t r = 0; r < 4; ++r) {
        for (int i = 0; i < per; ++i) {
          a[(lane / 4 + r % 2 * 8) * depth + (lane % 4 + r / 2 * 4) * per + i] =
              element_value(product.operand, work.a[lane][r], i);
        }
      }
    }
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    float* d = work.d[lane];
    TensorCore::Held& held = core.accumulators[d];
    for (uint32_t i = 0; i < n / 2; ++i) {
      const float* left = &a[(lane / 4 + i / 2 % 2 * 8) * depth];
      const float* right = &b[(i / 4 * 8 + lane % 4 * 2 + i % 2) * depth];
      float sum = work.add ? held.values[i] : 0;
      for (uint32_t k = 0; k < depth; ++k) sum += left[k] * right[k];
      held.values[i] = sum;
    }
    if (--held.in_flight) continue;
    for (uint32_t i = 0; i < n / 2; ++i) {
      uint32_t bits;
      std::memcpy(&bits, d + i, 4);
      if (bits != kPoison) {
        fail(work.site, "wgmma: accumulator " + std::to_string(i) + " of lane " +
                            std::to_string(lane) + " was written while the product was in flight");
      }
      d[i] = held.values[i];
    }
    core.accumulators.erase(d);
  }
}

}  // namespace

void wgmma_fence(Site site) {
  check_group("wgmma_fence", site);
  Thread& me = machine().current();
  TensorCore& core = me.block->tensor_cores[me.warp()];
  meet("wgmma_fence", ~0u, Aligned::kYes, &me, site, [&](const auto&) { core.fenced = true; });
}

void wgmma(const Product& product, float* d, const uint32_t* a, uint64_t a_descriptor,
           uint64_t b_descriptor, bool add, Site site) {
  check_group("wgmma", site);
  Thread& me = machine().current();
  Block& block = *me.block;
  TensorCore& core = block.tensor_cores[me.warp()];
  Argument mine{d, a, a_descriptor, b_descriptor, add};
  meet("wgmma", ~0u, Aligned::kYes, &mine, site, [&](const auto& lanes) {
    WarpProduct work{product, {}, {}, a == nullptr, add, {}, {}, site};
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const auto& argument = *static_cast<Argument*>(lanes[lane]);
      if (argument.a_descriptor != a_descriptor || argument.b_descriptor != b_descriptor ||
          argument.add != add) {
        fail(site, "wgmma: lane " + std::to_string(lane) +
                       " has another descriptor, or another choice of adding");
      }
      work.d[lane] = argument.d;
      if (a) std::copy_n(argument.a, 4, work.a[lane].begin());
      TensorCore::Held& held = core.accumulators[argument.d];
      if ((held.in_flight == 0 || a) && !core.fenced) {
        fail(site, "wgmma: no wgmma_fence since the registers were last free to be accessed");
      }
      if (held.in_flight++ == 0) {
        held.values.assign(argument.d, argument.d + product.n / 2);
        for (int i = 0; i < product.n / 2; ++i) std::memcpy(argument.d + i, &kPoison, 4);
      } else if (held.values.size() != static_cast<size_t>(product.n / 2)) {
        fail(site, "wgmma: the accumulators are in flight with another N");
      }
    }
    const Clock clock = joined(block, me.warp());
    const Access access{me.index, &clock, site, Proxy::kAsync};
    if (!a) {
      work.a_chunks =
          chunks_of(a_descriptor, product.mn_major_a, me.warp() % 4 * 16, 16, "A", site);
    }
    work.b_chunks =
        chunks_of(b_descriptor, product.mn_major_b, 0, static_cast<uint32_t>(product.n), "B", site);
    for (uint32_t chunk : work.a_chunks) block.shadow.begin_pending_read(chunk, 16, access);
    for (uint32_t chunk : work.b_chunks) block.shadow.begin_pending_read(chunk, 16, access);
    core.open.push_back(std::move(work));
  });
}

void wgmma_commit(Site site) {
  check_group("wgmma_commit", site);
  Thread& me = machine().current();
  TensorCore& core = me.block->tensor_cores[me.warp()];
  meet("wgmma_commit", ~0u, Aligned::kYes, &me, site, [&](const auto&) {
    core.groups.push_back(std::move(core.open));
    core.open.clear();
  });
}

void wgmma_wait(int pending_groups, Site site) {
  check_group("wgmma_wait", site);
  Thread& me = machine().current();
  Block& block = *me.block;
  TensorCore& core = block.tensor_cores[me.warp()];
  meet("wgmma_wait", ~0u, Aligned::kYes, &me, site, [&](const auto&) {
    if (core.groups.size() <= static_cast<size_t>(pending_groups)) return;
    const uint32_t agent = machine().threads() + kMaxMbarriers + me.warp();
    Clock clock = joined(block, me.warp());
    clock.seen[agent] = core.time;
    while (core.groups.size() > static_cast<size_t>(pending_groups)) {
      for (const WarpProduct& work : core.groups.front()) {
        complete(block, core, work);
        const Access access{agent, &clock, work.site, Proxy::kAsync};
        for (uint32_t chunk : work.a_chunks) block.shadow.end_pending_read(chunk, 16, access);
        for (uint32_t chunk : work.b_chunks) block.shadow.end_pending_read(chunk, 16, access);
      }
      core.groups.pop_front();
    }
    // All lanes know that the reads are over, and hand it on with their next arrival.
    for (uint32_t lane = 0; lane < 32; ++lane) {
      block.threads[me.warp() * 32 + lane].clock.seen[agent] = core.time;
    }
    ++core.time;
    core.fenced = false;
  });
}

void set_registers(int count, bool raise, Site site) {
  check_group("setmaxnreg", site);
  (void)count;
  (void)raise;
  meet("setmaxnreg", ~0u, Aligned::kYes, &machine().current(), site, [](const auto&) {});
}

}  // namespace attnforge::emulate

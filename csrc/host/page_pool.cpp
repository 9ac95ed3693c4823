#include "host/page_pool.h"

#include <algorithm>

#include "host/errors.h"
#include "host/select_slots.h"

namespace attnforge::host {
namespace {

using Guard = std::lock_guard<std::mutex>;

int64_t positive(const char* name, int64_t value) {
  if (value < 1) refuse("__init__: ", name, " ", value, " is not at least 1");
  return value;
}

}  // namespace

PagePool::PagePool(int64_t num_pages, int64_t page_size, int64_t lanes)
    : page_size_(positive("page_size", page_size)),
      allocator_(num_pages),
      tree_(allocator_, page_size_),
      sequences_(allocator_, page_size_, positive("lanes", lanes)) {}

// Evicts until `pages` are free, or throws and leaves everything as it was.
std::vector<int32_t> PagePool::make_room(int64_t pages) {
  const int64_t missing = pages - allocator_.num_free();
  if (missing <= 0) return {};
  const int64_t evictable = tree_.evictable();
  if (missing > evictable) {
    throw OutOfPages(sentence("extend: ", pages, " pages are needed; ", allocator_.num_free(),
                              " of ", allocator_.num_pages(), " are free and ", evictable,
                              " more hold prefixes that nobody uses; ",
                              "free sequences, or make num_pages larger"));
  }
  std::vector<int32_t> evicted = tree_.evict(missing);
  counters_.pages_evicted += static_cast<int64_t>(evicted.size());
  return evicted;
}

std::vector<int32_t> PagePool::allocate(int64_t count) {
  const Guard guard(lock_);
  return allocator_.allocate(count);
}

void PagePool::share(std::span<const int32_t> pages) {
  const Guard guard(lock_);
  allocator_.share(pages);
}

std::vector<int32_t> PagePool::release(std::span<const int32_t> pages) {
  const Guard guard(lock_);
  return allocator_.release(pages);
}

int32_t PagePool::references(int32_t page) const {
  const Guard guard(lock_);
  return allocator_.references(page);
}

std::pair<int64_t, int64_t> PagePool::create(std::span<const int64_t> tokens, int64_t space) {
  const Guard guard(lock_);
  const std::vector<int32_t> prefix = tree_.match(space, tokens);
  allocator_.share(prefix);
  const auto found = static_cast<int64_t>(prefix.size()) * page_size_;
  counters_.prompt_tokens += static_cast<int64_t>(tokens.size());
  counters_.prefix_tokens += found;
  return {sequences_.create(prefix), found};
}

int64_t PagePool::match_prefix(std::span<const int64_t> tokens, int64_t space) {
  const Guard guard(lock_);
  return static_cast<int64_t>(tree_.match(space, tokens).size()) * page_size_;
}

std::vector<int32_t> PagePool::commit(int64_t id, std::span<const int64_t> tokens, int64_t space) {
  const Guard guard(lock_);
  const auto count = static_cast<int64_t>(tokens.size());
  if (count > sequences_.length(id)) {
    refuse("commit: ", count, " tokens for sequence ", id, ", which holds ", sequences_.length(id),
           "; pass the tokens whose keys and values were appended");
  }
  if (sequences_.compacted(id)) {
    refuse("commit: sequence ", id, " was compacted, so its pages are no prefix of its tokens; ",
           "commit before compacting");
  }
  const std::vector<int32_t>& own = sequences_.pages(id);
  const std::vector<int32_t> known =
      tree_.insert(space, tokens, std::span(own).first(count / page_size_));
  return sequences_.adopt(id, known);
}

int64_t PagePool::fork(int64_t id) {
  const Guard guard(lock_);
  return sequences_.fork(id);
}

std::vector<int32_t> PagePool::free(int64_t id) {
  const Guard guard(lock_);
  return sequences_.free(id);
}

PagePool::Extension PagePool::extend(std::span<const int64_t> ids,
                                     std::span<const int64_t> counts) {
  const Guard guard(lock_);
  Extension result;
  result.evicted = make_room(sequences_.pages_needed(ids, counts));
  result.copies = sequences_.extend(ids, counts);
  counters_.pages_copied += static_cast<int64_t>(result.copies.size());
  return result;
}

std::vector<int32_t> PagePool::truncate(int64_t id, int64_t length) {
  const Guard guard(lock_);
  return sequences_.truncate(id, length);
}

Compaction PagePool::compact(int64_t id, std::span<const double> scores,
                             std::span<const int64_t> keep, int64_t sink, int64_t recent) {
  const Guard guard(lock_);
  const int64_t length = sequences_.length(id);
  const auto lists = static_cast<int64_t>(keep.size());
  if (lists != 1 && lists != sequences_.lanes()) {
    refuse("compact: keep has ", lists, " entries; pass one for all lanes, or one for each of ",
           sequences_.lanes());
  }
  if (lists == 1 && sequences_.ragged(id)) {
    refuse("compact: sequence ", id, " has lanes of different lengths; pass keep and scores for ",
           "each lane");
  }
  if (!scores.empty() && static_cast<int64_t>(scores.size()) != lists * length) {
    refuse("compact: ", scores.size(), " scores for sequence ", id, " of ", length,
           " tokens; pass one score per token", lists > 1 ? " and lane" : "");
  }
  const std::vector<double> equal(scores.empty() ? length : 0, 0.0);
  std::vector<std::vector<int64_t>> kept;
  for (int64_t l = 0; l < lists; ++l) {
    const std::span<const double> row = scores.empty() ? equal : scores.subspan(l * length, length);
    kept.push_back(select_slots(row.first(sequences_.lane_length(id, l)), keep[l], sink, recent));
  }
  return sequences_.compact(id, kept);
}

std::vector<int32_t> PagePool::evict(int64_t count) {
  const Guard guard(lock_);
  if (count < 0) refuse("evict: count ", count, " is negative");
  std::vector<int32_t> evicted = tree_.evict(count);
  counters_.pages_evicted += static_cast<int64_t>(evicted.size());
  return evicted;
}

std::vector<int32_t> PagePool::pages(int64_t id) const {
  const Guard guard(lock_);
  return sequences_.pages(id);
}

std::vector<int32_t> PagePool::lengths(std::span<const int64_t> ids) const {
  const Guard guard(lock_);
  std::vector<int32_t> out;
  out.reserve(ids.size());
  for (const int64_t id : ids) out.push_back(static_cast<int32_t>(sequences_.length(id)));
  return out;
}

std::vector<int32_t> PagePool::lane_lengths(std::span<const int64_t> ids) const {
  const Guard guard(lock_);
  std::vector<int32_t> out;
  if (std::ranges::none_of(ids, [&](int64_t id) { return sequences_.ragged(id); })) return out;
  for (const int64_t id : ids) {
    for (int64_t l = 0; l < sequences_.lanes(); ++l) {
      out.push_back(static_cast<int32_t>(sequences_.lane_length(id, l)));
    }
  }
  return out;
}

std::vector<int32_t> PagePool::block_table(std::span<const int64_t> ids, int64_t columns) const {
  const Guard guard(lock_);
  size_t widest = 0;
  for (const int64_t id : ids) widest = std::max(widest, sequences_.pages(id).size());
  if (columns == 0) columns = std::max<int64_t>(static_cast<int64_t>(widest), 1);
  if (columns < static_cast<int64_t>(widest)) {
    refuse("block_table: ", columns, " columns, but a sequence has ", widest,
           " pages; pass at least as many columns");
  }
  std::vector<int32_t> table(ids.size() * static_cast<size_t>(columns), -1);
  auto row = table.begin();
  for (const int64_t id : ids) {
    const std::vector<int32_t>& own = sequences_.pages(id);
    std::copy(own.begin(), own.end(), row);
    row += columns;
  }
  return table;
}

PoolState PagePool::state() const {
  const Guard guard(lock_);
  return {allocator_.num_pages(), allocator_.num_free(), tree_.num_pages(),
          tree_.evictable(),      sequences_.count(),    counters_};
}

}  // namespace attnforge::host

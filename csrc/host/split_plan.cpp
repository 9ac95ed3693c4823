#include "host/split_plan.h"

#include <algorithm>
#include <limits>

#include "host/errors.h"

namespace attnforge::host {
namespace {

int64_t pieces_of(std::span<const int64_t> lengths, int64_t piece) {
  int64_t count = 0;
  for (const int64_t length : lengths) count += (length + piece - 1) / piece;
  return count;
}

}  // namespace

SplitPlan::SplitPlan(int64_t max_batch, int64_t max_pieces, int64_t page_size)
    : max_batch_(max_batch), max_pieces_(max_pieces), page_size_(page_size) {
  if (max_batch < 1 || page_size < 1 || max_pieces < max_batch) {
    throw std::invalid_argument(
        "attnforge._host.SplitPlan: max_batch " + std::to_string(max_batch) + ", max_pieces " +
        std::to_string(max_pieces) + " and page_size " + std::to_string(page_size) +
        " must be positive, and max_pieces at least max_batch (a piece per sequence)");
  }
  table_.assign(static_cast<size_t>(3 * max_pieces + max_batch + 1), 0);
  std::fill_n(table_.begin(), max_pieces, -1);
}

void SplitPlan::plan(std::span<const int64_t> lengths, int64_t fixed) {
  const auto fail = [](const std::string& what) {
    throw std::invalid_argument("attnforge._host.SplitPlan.plan: " + what);
  };
  if (static_cast<int64_t>(lengths.size()) > max_batch_) {
    fail(std::to_string(lengths.size()) + " lengths, but the plan was made for max_batch " +
         std::to_string(max_batch_) + "; make a larger plan");
  }
  int64_t longest = 1;
  for (const int64_t length : lengths) {
    if (length < 0 || length > std::numeric_limits<int32_t>::max()) {
      fail("length " + std::to_string(length) + " is not in 0..2147483647");
    }
    longest = std::max(longest, length);
  }
  if (fixed < 0 || fixed % page_size_ != 0) {
    fail("fixed " + std::to_string(fixed) + " is not a multiple of page_size " +
         std::to_string(page_size_));
  }
  int64_t piece = fixed;
  if (fixed == 0) {
    // Pieces fall as their size grows: bisect over pages per piece.
    int64_t low = 1, high = (longest + page_size_ - 1) / page_size_;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (pieces_of(lengths, middle * page_size_) <= max_pieces_) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    piece = low * page_size_;
  } else if (pieces_of(lengths, fixed) > max_pieces_) {
    fail("pieces of fixed " + std::to_string(fixed) + " tokens are " +
         std::to_string(pieces_of(lengths, fixed)) + ", more than max_pieces " +
         std::to_string(max_pieces_) + "; make a larger plan, or longer pieces");
  }
  piece_ = piece;
  int32_t* sequence = table_.data();
  int32_t* begin = sequence + max_pieces_;
  int32_t* end = begin + max_pieces_;
  int32_t* first = end + max_pieces_;
  int64_t at = 0;
  for (int64_t s = 0; s < max_batch_; ++s) {
    first[s] = static_cast<int32_t>(at);
    const int64_t length = s < static_cast<int64_t>(lengths.size()) ? lengths[s] : 0;
    for (int64_t token = 0; token < length; token += piece, ++at) {
      sequence[at] = static_cast<int32_t>(s);
      begin[at] = static_cast<int32_t>(token);
      end[at] = static_cast<int32_t>(std::min(token + piece, length));
    }
  }
  first[max_batch_] = static_cast<int32_t>(at);
  std::fill(sequence + at, sequence + max_pieces_, -1);
  std::fill(begin + at, begin + max_pieces_, 0);
  std::fill(end + at, end + max_pieces_, 0);
}

}  // namespace attnforge::host

// A planned split of the keys of the paged family, as bindings hand it to kernels.
#pragma once

#include <cstdint>

namespace attnforge {

// Piece n is keys begin[n] .. end[n] - 1 of sequence[n], and those of sequence b are pieces
// first[b]
// .. first[b + 1] - 1, ascending. On a GPU nobody has looked at a value: pieces of no sequence, and
// those that another sequence counts as its own, are nothing.
struct Pieces {
  const int32_t *sequence = nullptr, *begin = nullptr, *end = nullptr;  // [count]
  const int32_t* first = nullptr;  // [batch + 1]; null: no plan
  int64_t count = 0;
};

}  // namespace attnforge

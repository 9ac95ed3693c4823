// How TMA sees Q, K and V: rank 4, [head_dim, heads, rows, batch], any strides of 16 bytes, of 16
// bits or e4m3.
//
// A dimension without a stride (broadcast, or the batch of packed sequences) has extent 1 there,
// and its coordinate is 0. Rows must have one.
#pragma once

#include "attnforge/params.h"
#include "cuda/tensor_map.h"

namespace attnforge::cuda {

struct Sm90Maps {
  TensorMap q, k, v;
};

// Boxes of 128 bytes of columns, `heads` heads and `rows` rows.
struct Sm90Box {
  int heads, rows;
};

// Of tiles of Q. Rows of short sequences share them with the other heads of their group, whole
// queries of which a box holds (Sm90Schedule::rows).
inline Sm90Box q_box(const FlashFwdParams& params, int block_m) {
  const FlashProblem& p = params.problem;
  const int group = static_cast<int>(p.heads_q / p.heads_k);
  const bool pack = p.seqlen_q <= block_m / 2 && group <= block_m && params.q.head_stride != 0;
  return pack ? Sm90Box{group, block_m / group} : Sm90Box{1, block_m};
}

inline int map_rows(TensorMap* map, const TensorRef& t, const FlashProblem& p, int64_t dim,
                    int64_t heads, int64_t rows, const Sm90Box& box) {
  const int64_t extents[] = {dim, t.head_stride == 0 ? 1 : heads, rows,
                             t.batch_stride == 0 ? 1 : p.batch};
  const int64_t strides[] = {1, t.head_stride, t.seq_stride, t.batch_stride};
  const uint32_t size = p.dtype == DType::kFloat8 ? 1 : 2;
  TensorShape shape = {
      t.data,
      4,
      {},
      {},
      {128 / size, static_cast<uint32_t>(box.heads), static_cast<uint32_t>(box.rows), 1},
      p.dtype == DType::kFloat8    ? TensorType::kByte
      : p.dtype == DType::kFloat16 ? TensorType::kF16
                                   : TensorType::kBf16,
      TensorSwizzle::k128};
  for (int d = 0; d < 4; ++d) {
    shape.extent[d] = static_cast<uint64_t>(extents[d]);
    shape.stride[d] = extents[d] == 1 ? 16 : size * static_cast<uint64_t>(strides[d]);
  }
  return make_tensor_map(map, shape);
}

inline int map_problem(Sm90Maps* maps, const FlashFwdParams& params, const Sm90Box& q_box,
                       int block_n) {
  const FlashProblem& p = params.problem;
  const int64_t rows_q = p.cu_seqlens_q == nullptr ? p.seqlen_q : p.total_q;
  const int64_t rows_k = p.cu_seqlens_k == nullptr ? p.seqlen_k : p.total_k;
  if (const int error = map_rows(&maps->q, params.q, p, p.head_dim, p.heads_q, rows_q, q_box)) {
    return error;
  }
  if (rows_k == 0) {  // nothing will be loaded, but a map needs memory
    maps->k = maps->v = maps->q;
    return 0;
  }
  const Sm90Box box = {1, block_n};
  const int error = map_rows(&maps->k, params.k, p, p.head_dim, p.heads_k, rows_k, box);
  return error ? error : map_rows(&maps->v, params.v, p, p.v_head_dim, p.heads_k, rows_k, box);
}

}  // namespace attnforge::cuda

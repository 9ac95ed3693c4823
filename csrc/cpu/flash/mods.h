// The mods of a call at one query or key of a sequence: FlashMods' strides are walked here alone.
// Positions are data: they are clamped to the tables.
#pragma once

#include "cpu/flash/problem.h"
#include "cpu/micro/dropout.h"
#include "cpu/micro/rope.h"
#include "cpu/micro/scores.h"

namespace attnforge::cpu::ATTNFORGE_ISA {

AF_INLINE RowMods row_mods(const FlashProblem& p, const Sequence& s, int64_t head, int64_t i) {
  const FlashMods& m = p.mods;
  RowMods row{};
  row.keys = s.k_len;
  row.unit = score_unit(p);
  row.position = i + s.offset;
  if (m.key_bias) {
    row.key_bias = m.key_bias + s.batch * m.key_bias_batch + head * m.key_bias_head + s.k_row;
  }
  if (m.bias) {
    row.bias_dtype = m.bias_dtype;
    const int64_t item = item_size(m.bias_dtype);
    row.bias = static_cast<const char*>(m.bias) +
               (s.batch * m.bias_batch + head * m.bias_head + i * m.bias_row) * item;
  }
  if (m.rel_bias) {
    row.rel_bias = m.rel_bias + head * m.rel_bias_head;
    row.rel_radius = m.rel_radius;
  }
  if (m.decay && s.k_len > 0) {
    row.decay = m.decay + s.batch * m.decay_batch + head * m.decay_head + s.k_row;
    row.decay_here = row.decay[max64(0, min64(row.position, s.k_len - 1))];
  }
  if (m.segments_q) {
    row.segments = m.segments_k + s.batch * m.segments_k_batch + s.k_row;
    row.segment = m.segments_q[s.batch * m.segments_q_batch + s.q_row + i];
  }
  if (m.mask) {
    row.mask = m.mask + s.batch * m.mask_batch + head * m.mask_head + i * m.mask_row;
    row.mask_first = s.k_len - m.mask_keys;
  }
  return row;
}

// What multiplies the products of a row beside the softmax scale; it makes up for loads of fp8.
AF_INLINE float row_scale(const FlashProblem& p, const Sequence& s, int64_t head, int64_t i) {
  const FlashMods& m = p.mods;
  float scale = 1.0f;
  if (m.row_scale) {
    scale = m.row_scale[s.batch * m.row_scale_batch + head * m.row_scale_head + s.q_row + i];
  }
  if (m.qk_descale) {
    scale *= m.qk_descale[s.batch * p.heads_k + head / group_size(p)];
  }
  if (p.dtype == DType::kFloat8) scale *= kFloat8Unit;
  if (p.q_dtype == DType::kFloat8) scale *= kFloat8Unit;
  return scale;
}

// What multiplies the output of a KV head; it makes up for loads of fp8.
AF_INLINE float value_scale(const FlashProblem& p, const Sequence& s, int64_t kv_head) {
  const FlashMods& m = p.mods;
  const float unit = p.dtype == DType::kFloat8 ? kFloat8Unit : 1.0f;
  if (!m.v_descale) return unit;
  return unit * m.v_descale[s.batch * p.heads_k + kv_head];
}

AF_INLINE Dropout row_dropout(const FlashProblem& p, const Sequence& s, int64_t head, int64_t i) {
  return dropout_of(p.mods, s.batch * p.heads_q + head, i);
}

AF_INLINE Rotation rotation_at(const FlashMods& m, int64_t kv_head, int64_t position) {
  position = max64(0, min64(position, m.rope_positions - 1));
  const int64_t row = kv_head * m.rope_head + position * m.rope_half;
  return {m.rope_cos + row, m.rope_sin + row, m.rope_half, m.rope_interleaved};
}
AF_INLINE Rotation query_rotation(const FlashProblem& p, const Sequence& s, int64_t head,
                                  int64_t i) {
  const FlashMods& m = p.mods;
  return rotation_at(m, head / group_size(p),
                     m.positions_q[s.batch * m.positions_q_batch + s.q_row + i]);
}
AF_INLINE Rotation key_rotation(const FlashProblem& p, const Sequence& s, int64_t kv_head,
                                int64_t j) {
  const FlashMods& m = p.mods;
  return rotation_at(m, kv_head, m.positions_k[s.batch * m.positions_k_batch + s.k_row + j]);
}

// f(row): the query row `src` as it is multiplied, rotated into `room` if there are tables.
template <class T, class F>
AF_INLINE void with_query(const FlashProblem& p, const Sequence& s, int64_t head, int64_t i,
                          const T* src, float* room, const F& f) {
  if (!p.mods.rope_cos) return f(src);
  rotate_row(query_rotation(p, s, head, i), src, p.head_dim, room);
  f(static_cast<const float*>(room));
}

// f(rows, stride): keys [lo, hi) of the sequence, the first at src; rotated, they lie in `room`
// [hi - lo][D rounded up to a vector].
template <class T, class F>
AF_INLINE void with_keys(const FlashProblem& p, const Sequence& s, int64_t kv_head, Interval keys,
                         const T* src, int64_t stride, float* room, const F& f) {
  if (!p.mods.rope_cos) return f(src, stride);
  const int64_t ld = round_up(p.head_dim, kLanes);
  for (int64_t j = keys.lo; j < keys.hi; ++j) {
    rotate_row(key_rotation(p, s, kv_head, j), src + (j - keys.lo) * stride, p.head_dim,
               room + (j - keys.lo) * ld);
  }
  f(static_cast<const float*>(room), ld);
}

}  // namespace attnforge::cpu::ATTNFORGE_ISA

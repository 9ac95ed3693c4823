// The flash kernels as handlers of XLA's foreign function interface, for jax.ffi: buffers to params
// structs, XLA's threads, no torch tensor. attnforge_native::xla_handler tells their addresses, so
// that the library exports nothing.
//
// Arguments  q [.., B, Sq, Hq, D], k [.., B, Sk, Hk, D], v [.., B, Sk, Hk, Dv] and what may be
// absent, which then has no elements: seqused_k [.., B], alibi_slopes [.., B|1, Hq], sinks [..,
// Hq], row_bounds [.., B|1, Hq|1, Sq, 2], mask and bias [.., B|1, Hq|1, Sq, Sk]; dimensions before
// those come from vmap and are the same for all. Backward: then dout, dlse, out, lse, out_lo.
// Results    out, lse [.., B, Hq, Sq], out_lo (or no elements); backward dq, dk, dv, delta, dbias.
// Attributes softmax_scale, softcap (fp32), window_left, window_right (int64).
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "bindings/flash_routes.h"
#include "bindings/tensors.h"
#include "bindings/xla_threads.h"

namespace attnforge::cpu {
namespace {

void want(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// A dense buffer whose last `rank` dimensions belong to one call.
class Operand {
 public:
  Operand(const xla::Buffers& buffers, int64_t index, int64_t rank) : rank_(rank) {
    want(index < buffers.size, "attnforge: a flash call lacks operands");
    buffer_ = buffers.buffers[index];
    want(buffer_->rank >= rank, "attnforge: an operand of a flash call lacks dimensions");
  }

  int64_t size(int64_t dim) const { return buffer_->dims[buffer_->rank - rank_ + dim]; }
  int64_t outer() const { return product(0, buffer_->rank - rank_); }
  int64_t elements() const { return product(0, buffer_->rank); }
  bool present() const { return elements() > 0; }
  int64_t item() const {
    switch (buffer_->dtype) {
      case xla::kPred:
        return 1;
      case xla::kF16:
      case xla::kBF16:
        return 2;
      default:
        return 4;
    }
  }
  DType dtype() const {
    want(buffer_->dtype == xla::kF32 || buffer_->dtype == xla::kF16 || buffer_->dtype == xla::kBF16,
         "attnforge: dtype must be float32, float16 or bfloat16");
    return buffer_->dtype == xla::kF32   ? DType::kFloat32
           : buffer_->dtype == xla::kF16 ? DType::kFloat16
                                         : DType::kBFloat16;
  }

  // The part that belongs to one of `calls` calls; null if there is none.
  template <class T = void>
  T* part(int64_t call, int64_t calls) const {
    if (!present()) return nullptr;
    return reinterpret_cast<T*>(static_cast<char*>(buffer_->data) +
                                elements() / calls * call * item());
  }
  void zero() const {
    if (present()) std::memset(buffer_->data, 0, elements() * item());
  }

 private:
  int64_t product(int64_t first, int64_t last) const {
    int64_t n = 1;
    for (int64_t d = first; d < last; ++d) n *= buffer_->dims[d];
    return n;
  }

  int64_t rank_;
  const xla::Buffer* buffer_;
};

template <class T>
T attribute(const xla::Attributes& all, const char* name, xla::DataType dtype) {
  for (int64_t n = 0; n < all.size; ++n) {
    if (std::string(all.names[n]->data, all.names[n]->size) != name) continue;
    const auto* scalar = static_cast<const xla::Scalar*>(all.values[n]);
    want(all.types[n] == xla::kScalarAttribute && scalar->dtype == dtype,
         "attnforge: an attribute of a flash call has a wrong type");
    T value;
    std::memcpy(&value, scalar->value, sizeof(T));
    return value;
  }
  throw std::invalid_argument(std::string("attnforge: a flash call lacks the attribute ") + name);
}

// What forward and backward share. Calls of vmap are one call with a larger batch, unless something
// is shared by the sequences of each: then they run one after another.
class FlashCall {
 public:
  explicit FlashCall(const xla::CallFrame& frame)
      : frame_(frame),
        q_(frame.arguments, 0, 4),
        k_(frame.arguments, 1, 4),
        v_(frame.arguments, 2, 4),
        seqused_(frame.arguments, 3, 1),
        alibi_(frame.arguments, 4, 2),
        sinks_(frame.arguments, 5, 1),
        bounds_(frame.arguments, 6, 4),
        mask_(frame.arguments, 7, 4),
        bias_(frame.arguments, 8, 4) {
    check();
    const int64_t outer = q_.outer(), batch = q_.size(0);
    const auto shared = [batch](const Operand& x) { return x.present() && x.size(0) != batch; };
    const bool apart = outer > 1 && (sinks_.present() || shared(alibi_) || shared(bounds_) ||
                                     shared(mask_) || shared(bias_));
    calls_ = apart ? outer : 1;
    batch_ = apart ? batch : outer * batch;
  }

  int64_t calls() const { return calls_; }
  bool computes() const { return q_.elements() > 0; }

  FlashProblem problem(int64_t n) const {
    FlashProblem p;
    p.dtype = p.q_dtype = p.out_dtype = q_.dtype();
    p.batch = batch_;
    p.seqlen_q = q_.size(1), p.seqlen_k = k_.size(1);
    p.heads_q = q_.size(2), p.heads_k = k_.size(2);
    p.head_dim = q_.size(3), p.v_head_dim = v_.size(3);
    p.seqused_k = seqused_.part<int32_t>(n, calls_);
    p.alibi_slopes = alibi_.part<float>(n, calls_);
    p.alibi_batch_stride = batch_stride(alibi_, p.heads_q);
    p.sinks = sinks_.part<float>(n, calls_);
    p.softmax_scale = attribute<float>(frame_.attributes, "softmax_scale", xla::kF32);
    p.softcap = attribute<float>(frame_.attributes, "softcap", xla::kF32);
    p.window_left = window(attribute<int64_t>(frame_.attributes, "window_left", xla::kS64));
    p.window_right = window(attribute<int64_t>(frame_.attributes, "window_right", xla::kS64));
    FlashMods& m = p.mods;
    m.row_bounds = bounds_.part<int32_t>(n, calls_);  // strides are in pairs
    m.row_bounds_batch = batch_stride(bounds_, p.seqlen_q * bounds_.size(1));
    m.row_bounds_head = head_stride(bounds_, p.seqlen_q);
    const int64_t scores = p.seqlen_q * p.seqlen_k;
    m.mask = mask_.part<uint8_t>(n, calls_);
    m.mask_batch = batch_stride(mask_, scores * mask_.size(1));
    m.mask_head = head_stride(mask_, scores);
    m.mask_row = m.mask_keys = p.seqlen_k;
    m.bias = bias_.part(n, calls_);
    if (m.bias) m.bias_dtype = bias_.dtype();
    m.bias_batch = batch_stride(bias_, scores * bias_.size(1));
    m.bias_head = head_stride(bias_, scores);
    m.bias_row = p.seqlen_k;
    m.any = m.mask || m.bias;
    return p;
  }

  TensorRef q(int64_t n) const { return rows(q_, n); }
  TensorRef k(int64_t n) const { return rows(k_, n); }
  TensorRef v(int64_t n) const { return rows(v_, n); }
  TensorRef rows(const Operand& x, int64_t n) const {  // [B, S, H, D]
    const int64_t head = x.size(3), row = head * x.size(2);
    return {x.part(n, calls_), row * x.size(1), row, head};
  }
  RowStatRef stat(const Operand& x, int64_t n) const {  // [B, H, S]
    return {x.part<float>(n, calls_), x.size(1) * x.size(2), x.size(2)};
  }

 private:
  // Sizes that the kernels would read by; that they fit each other otherwise is the caller's part.
  void check() const {
    const int64_t batch = q_.size(0), heads = q_.size(2), heads_k = k_.size(2);
    const int64_t rows = q_.size(1), keys = k_.size(1), dim = q_.size(3), v_dim = v_.size(3);
    want(k_.size(0) == batch && v_.size(0) == batch && v_.size(1) == keys &&
             v_.size(2) == heads_k && k_.size(3) == dim && heads_k > 0 && heads % heads_k == 0 &&
             q_.dtype() == k_.dtype() && q_.dtype() == v_.dtype(),
         "attnforge: q, k and v of a flash call do not fit");
    want(dim % 8 == 0 && v_dim % 8 == 0 && dim > 0 && v_dim > 0 && dim <= 576 && v_dim <= 1024,
         "attnforge: head dims must be multiples of 8, up to 576 and 1024 for v");
    const auto fits = [](int64_t size, int64_t whole) { return size == 1 || size == whole; };
    const auto scores = [&](const Operand& x, int64_t last) {
      return !x.present() || (fits(x.size(0), batch) && fits(x.size(1), heads) &&
                              x.size(2) == rows && x.size(3) == last);
    };
    want((!seqused_.present() || seqused_.size(0) == batch) &&
             (!alibi_.present() || (fits(alibi_.size(0), batch) && alibi_.size(1) == heads)) &&
             (!sinks_.present() || sinks_.size(0) == heads) && scores(bounds_, 2) &&
             scores(mask_, keys) && scores(bias_, keys),
         "attnforge: what goes with q, k and v of a flash call does not fit them");
  }

  int64_t batch_stride(const Operand& x, int64_t stride) const {
    return x.outer() / calls_ * x.size(0) == batch_ ? stride : 0;
  }
  int64_t head_stride(const Operand& x, int64_t stride) const {
    return x.size(1) == q_.size(2) ? stride : 0;
  }

  const xla::CallFrame& frame_;
  Operand q_, k_, v_, seqused_, alibi_, sinks_, bounds_, mask_, bias_;
  int64_t calls_, batch_;
};

template <class Params>
void run_sized(int64_t (*size)(const Params&, int64_t),
               void (*kernel)(const Params&, const Workers&), Params& params,
               const Workers& workers) {
  const int64_t bytes = size(params, workers.num_threads);
  const auto align = std::align_val_t{4096};
  void* scratch = ::operator new(std::max<int64_t>(bytes, 64), align);
  advise_huge_pages(scratch, bytes);
  params.workspace = scratch;
  kernel(params, workers);
  ::operator delete(scratch, align);
}

void flash_fwd(const xla::CallFrame& frame) {
  const FlashCall call(frame);
  if (!call.computes()) return;
  const Operand out(frame.results, 0, 4), lse(frame.results, 1, 3), out_lo(frame.results, 2, 4);
  const Workers workers = xla::workers_of(frame);
  for (int64_t n = 0; n < call.calls(); ++n) {
    FlashFwdParams params;
    params.problem = call.problem(n);
    params.q = call.q(n), params.k = call.k(n), params.v = call.v(n);
    params.out = call.rows(out, n), params.out_lo = call.rows(out_lo, n);
    params.lse = call.stat(lse, n);
    run_flash_routes(params, [&](auto size, auto kernel) {
      run_sized<FlashFwdParams>(size, kernel, params, workers);
    });
  }
}

void flash_bwd(const xla::CallFrame& frame) {
  const FlashCall call(frame);
  const Operand dout(frame.arguments, 9, 4), dlse(frame.arguments, 10, 3);
  const Operand out(frame.arguments, 11, 4), lse(frame.arguments, 12, 3);
  const Operand out_lo(frame.arguments, 13, 4);
  const Operand dq(frame.results, 0, 4), dk(frame.results, 1, 4), dv(frame.results, 2, 4);
  const Operand delta(frame.results, 3, 3), dbias(frame.results, 4, 4);
  dbias.zero();            // the kernel adds to it
  if (!call.computes()) {  // no rows: nothing reaches the keys
    dk.zero(), dv.zero();
    return;
  }
  const Workers workers = xla::workers_of(frame);
  for (int64_t n = 0; n < call.calls(); ++n) {
    FlashBwdParams params;
    const FlashProblem& p = params.problem = call.problem(n);
    params.q = call.q(n), params.k = call.k(n), params.v = call.v(n);
    params.dout = call.rows(dout, n), params.out = call.rows(out, n);
    params.out_lo = call.rows(out_lo, n);
    params.lse = call.stat(lse, n), params.dlse = call.stat(dlse, n);
    params.dq = call.rows(dq, n), params.dk = call.rows(dk, n), params.dv = call.rows(dv, n);
    params.delta = call.stat(delta, n);
    params.dbias = dbias.part<float>(n, call.calls());
    params.dbias_batch = p.mods.bias_batch, params.dbias_head = p.mods.bias_head;
    params.dbias_row = p.mods.bias_row;
    run_sized(kernels().flash_bwd_workspace, kernels().flash_bwd, params, workers);
  }
}

template <void (*serve)(const xla::CallFrame&)>
xla::Error* handler(xla::CallFrame* frame) {
  for (xla::Extension* e = frame->extensions; e; e = e->next) {
    if (e->type != xla::kMetadataExtension) continue;
    xla::Version& version = reinterpret_cast<xla::MetadataExtension*>(e)->metadata->version;
    version.major = xla::kMajor, version.minor = xla::kMinor;
    return nullptr;
  }
  try {
    const xla::Serving scope(*frame);
    serve(*frame);
    return nullptr;
  } catch (const std::exception& error) {
    xla::ErrorCreate args = {sizeof(args), nullptr, error.what(), xla::kInvalidArgument};
    return frame->api->error_create(&args);
  }
}

// The address of a handler, for a PyCapsule.
int64_t xla_handler(std::string name) {
  if (name == "flash_fwd") return reinterpret_cast<int64_t>(&handler<flash_fwd>);
  STD_TORCH_CHECK(name == "flash_bwd", "attnforge_native: no XLA handler ", name);
  return reinterpret_cast<int64_t>(&handler<flash_bwd>);
}

}  // namespace
}  // namespace attnforge::cpu

STABLE_TORCH_LIBRARY_FRAGMENT(attnforge_native, m) {
  m.def("xla_handler(str name) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(attnforge_native, CompositeExplicitAutograd, m) {
  m.impl("xla_handler", TORCH_BOX(&attnforge::cpu::xla_handler));
}

// What a handler on the CPU needs of XLA's foreign function interface, declared by its C interface
// (openxla/xla, xla/ffi/api/c_api.h): no build needs jaxlib, and one library serves every version
// of it. These are the structs of version 0.1, which later versions only append to; each begins
// with its size and a list of extensions. tests/integrations/test_jax.py compares the layouts with
// the installed jaxlib's header.
#pragma once

#include <cstddef>
#include <cstdint>

namespace attnforge::xla {

constexpr int kMajor = 0, kMinor = 1;

constexpr int kMetadataExtension = 1;
struct Extension {
  size_t struct_size;
  int type;
  Extension* next;
};

struct Version {
  size_t struct_size;
  Extension* extensions;
  int major, minor;
};

// A call that carries this extension asks what the handler is and computes nothing.
struct Metadata {
  size_t struct_size;
  Version version;
  uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

enum DataType : int { kPred = 1, kS32 = 4, kS64 = 5, kF16 = 10, kF32 = 11, kBF16 = 16 };

struct Buffer {
  size_t struct_size;
  Extension* extensions;
  DataType dtype;
  void* data;
  int64_t rank;
  const int64_t* dims;
};

// The arguments or the results of a call.
struct Buffers {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  const int* types;
  const Buffer* const* buffers;
};

struct Text {
  const char* data;
  size_t size;
};
constexpr int kScalarAttribute = 3;
struct Scalar {
  DataType dtype;
  const void* value;
};
struct Attributes {
  size_t struct_size;
  Extension* extensions;
  int64_t size;
  const int* types;
  const Text* const* names;
  const void* const* values;
};

struct Error;
struct Context;

constexpr int kInvalidArgument = 3;
struct ErrorCreate {
  size_t struct_size;
  Extension* extensions;
  const char* message;
  int code;
};
struct ErrorDestroy {
  size_t struct_size;
  Extension* extensions;
  Error* error;
};
struct ThreadPoolSchedule {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  void (*task)(void* data);
  void* data;
};
struct ThreadPoolNumThreads {
  size_t struct_size;
  Extension* extensions;
  Context* context;
  int64_t* num_threads;
};

struct Api {
  size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*error_create)(ErrorCreate*);
  void* error_get_message;
  void (*error_destroy)(ErrorDestroy*);
  void* not_used_here[8];
  Error* (*thread_pool_schedule)(ThreadPoolSchedule*);
  Error* (*thread_pool_num_threads)(ThreadPoolNumThreads*);
};

struct CallFrame {
  size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  int stage;
  Buffers arguments, results;
  Attributes attributes;
};

}  // namespace attnforge::xla

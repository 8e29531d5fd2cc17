// What shortcuts are made of: CPython, what they know of torch, the arguments of a call, results. Included by shortcut.cpp alone.
//
// Tensors are read through DLPack's exchange table, which torch gives to everybody; what DLPack does not tell (types, modes,
// gradients) is asked of Python's objects. Both are plain C and stable, so neither torch's nor Python's headers are needed.
#pragma once

#include <cfloat>
#include <cstddef>
#include <cstdint>

#include "../blip3o.h"

namespace {

typedef struct Anything* Object;  // CPython's PyObject*

}  // namespace

extern "C" {  // CPython's. Weak: without Python the library loads all the same.
#define PYTHON __attribute__((weak))
PYTHON void Py_IncRef(Object);
PYTHON void Py_DecRef(Object);
PYTHON void* PyEval_SaveThread();
PYTHON void PyEval_RestoreThread(void*);
PYTHON void PyErr_Clear();
PYTHON int PyObject_IsTrue(Object);
PYTHON Object PyObject_Type(Object);
PYTHON Object PyObject_GetAttr(Object, Object name);
PYTHON Object PyObject_CallNoArgs(Object);
PYTHON Object PyObject_CallFunctionObjArgs(Object, ...);
PYTHON Object PyObject_Call(Object, Object tuple, Object names);
PYTHON double PyFloat_AsDouble(Object);
PYTHON long long PyLong_AsLongLong(Object);
PYTHON unsigned long long PyLong_AsUnsignedLongLong(Object);
PYTHON Object PyLong_FromLongLong(long long);
PYTHON Object PyTuple_New(ptrdiff_t);
PYTHON int PyTuple_SetItem(Object tuple, ptrdiff_t, Object stolen);
}

namespace {

struct DLTensor {  // as dlpack.h has it
  void* data;
  int32_t device_type, device;  // 1: a CPU
  int32_t dims;
  uint8_t type, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t offset;
};

struct ExchangeTable {  // DLPackExchangeAPI, version 1
  uint32_t major, minor;
  void* earlier;
  void* allocate;
  void* managed_from_object;
  void* object_from_managed;
  int (*tensor_from_object)(Object, DLTensor*);
  void* stream;
};

// What a DLTensor says, to be kept: other Python code may change a tensor's shape as soon as Python allocates something, for then
// it may collect garbage, whose finalisers are anybody's.
struct View {
  void* data;
  int dims;
  uint8_t type, bits;
  int64_t shape[8], strides[8];
};

// What shortcut.py hands over, in its order.
struct Handles {
  const ExchangeTable* torch;
  Object none, yes, no, whole, real, tensor, parameter;
  Object requires_grad, level;                             // names of attributes
  Object modes, function_modes, tracing, transforms, forward_mode;  // the last a module with `level`
  Object grad_enabled, threads, is_neg;
  Object empty_like, large_like, new_empty, tokens_first, empty, scratch, float32;  // the last: keywords
  Object rms, layer, uniform, logit_normal, head, width;
} const* known;

const int64_t LARGE = 1 << 20;  // memory.py's

// A call's arguments, read one after another; `fits` says whether all were ordinary so far.
struct Call {
  Object const* next;
  bool fits, differentiated, wanted = false;  // the last: a gradient
  bool saving = false;                        // whether there is one argument more, for the backward pass's sake
  int instruction_set;

  Call(Object const* arguments, ptrdiff_t given, ptrdiff_t expected) : next(arguments) {
    saving = given == expected + 1;
    fits = (given == expected || saving) && !answer(known->modes) && !answer(known->function_modes) && !transformed();
    differentiated = fits && answer(known->grad_enabled);
    instruction_set = fits ? static_cast<int>(PyLong_AsLongLong(*next++)) : 0;
  }

  static bool answer(Object function) {
    const Object found = PyObject_CallNoArgs(function);
    const bool result = !found || PyObject_IsTrue(found);
    settled(found);
    return result;
  }

  static bool transformed() {
    const Object level = PyObject_GetAttr(known->forward_mode, known->level);
    const bool forward = !level || PyLong_AsLongLong(level) >= 0;
    settled(level);
    return forward || settled(PyObject_CallNoArgs(known->transforms)) != known->none || answer(known->tracing);
  }

  static bool is(Object x, Object type, Object other = nullptr) {
    const Object found = settled(PyObject_Type(x));  // x holds it
    return found == type || found == other;
  }

  // `object` to be compared, no longer ours; without one, without the error that says why.
  static Object settled(Object object) {
    if (object)
      Py_DecRef(object);
    else
      PyErr_Clear();
    return object;
  }

  void require(bool condition) { fits = fits && condition; }

  View tensor(bool maybe_empty = false) {
    if (!fits) return {};
    const Object object = *next++;
    fits = is(object, known->tensor, known->parameter);
    if (fits && differentiated) {
      const Object found = settled(PyObject_GetAttr(object, known->requires_grad));
      fits = found == known->no || found == known->yes;
      wanted = wanted || found == known->yes;
    }
    if (fits) {
      fits = settled(PyObject_CallFunctionObjArgs(known->is_neg, object, nullptr)) == known->no;
    }
    return fits ? read(object, maybe_empty) : View{};
  }

  View read(Object object, bool maybe_empty) {
    DLTensor x{};
    fits = !known->torch->tensor_from_object(object, &x);
    if (!fits) PyErr_Clear();
    require(x.device_type == 1 && x.lanes == 1 && !x.offset && x.dims <= 8);
    if (!fits) return {};
    View view{x.data, x.dims, x.type, x.bits, {}, {}};
    bool empty = false;
    for (int i = 0; i < x.dims; ++i) view.shape[i] = x.shape[i], view.strides[i] = x.strides[i], empty = empty || !x.shape[i];
    require(x.data || (maybe_empty && empty));  // null have also those that torch knows to be all zeros
    return view;
  }

  View optional(bool maybe_empty = false) {  // with null as its data where it is None
    if (!fits || *next != known->none) return tensor(maybe_empty);
    ++next;
    return {};
  }

  double number(double least) {
    const Object object = fits ? *next++ : nullptr;
    require(object && is(object, known->real));
    const double found = fits ? PyFloat_AsDouble(object) : 0.0;
    require(found >= least && found <= FLT_MAX);
    return found;
  }

  double number(double least, double absent) {  // which it is where None is given
    if (!fits || *next != known->none) return number(least);
    ++next;
    return absent;
  }

  int64_t integer(uint64_t end) {  // in [0, end], as the signed integer of the same bits
    const Object object = fits ? *next++ : nullptr;
    require(object && is(object, known->whole));
    const unsigned long long found = fits ? PyLong_AsUnsignedLongLong(object) : 0;
    if (found == ~0ull) PyErr_Clear(), fits = false;  // the largest of all, or an error
    require(found <= end);
    return static_cast<int64_t>(found);
  }

  bool either(Object yes, Object no) {  // which of two objects
    const Object object = fits ? *next++ : nullptr;
    require(object == yes || object == no);
    return object == yes;
  }

  // What is returned where nothing may be computed: False if a gradient alone stands in the way, otherwise None.
  bool stops() const { return !fits || wanted; }
  Object stopped() const {
    const Object answer = fits ? known->no : known->none;
    Py_IncRef(answer);
    return answer;
  }

  int threads(int64_t elements) const {
    if (elements < 16384) return 1;  // as blip3o_threads has it
    const Object found = PyObject_CallNoArgs(known->threads);
    const long long number = found ? PyLong_AsLongLong(found) : 1;
    if (found) Py_DecRef(found);
    return static_cast<int>(number);
  }
};

// The op itself, for so many elements; other threads of Python go on meanwhile if it is worth their while.
template <class Arguments>
int run(int (*op)(const Arguments*), const Arguments& a, int64_t elements) {
  if (elements < 16384) return op(&a);
  void* const thread = PyEval_SaveThread();
  const int status = op(&a);
  PyEval_RestoreThread(thread);
  return status;
}

int64_t count(const View& x) {
  int64_t product = 1;
  for (int i = 0; i < x.dims; ++i) product *= x.shape[i];
  return product;
}

int64_t last(const View& x) { return x.dims ? x.shape[x.dims - 1] : 0; }

bool dense(const View& x) {
  int64_t stride = 1;
  for (int i = x.dims - 1; i >= 0; --i) {
    if (x.shape[i] != 1 && x.strides[i] != stride) return false;
    stride *= x.shape[i];
  }
  return stride > 0;  // nothing at all goes the ordinary way
}

int dtype(const View& x) {
  if (x.type == 2) return x.bits == 32 ? BLIP3O_FLOAT32 : x.bits == 16 ? BLIP3O_FLOAT16 : -1;
  return x.type == 4 && x.bits == 16 ? BLIP3O_BFLOAT16 : -1;
}

bool same_shape(const View& x, const View& y) {
  bool same = x.dims == y.dims;
  for (int i = 0; same && i < x.dims; ++i) same = x.shape[i] == y.shape[i];
  return same;
}

bool alike(const View& x, const View& y) { return dtype(x) == dtype(y) && same_shape(x, y) && dense(y); }

// Of parameters [width]: whether it is none, or adjacent and of the wanted dtype.
bool row(const View& p, int64_t width, int wanted) {
  return !p.data || (p.dims == 1 && p.shape[0] == width && dense(p) && dtype(p) == wanted);
}

// Of conditions [batch, width]: rows may lie apart.
bool rows(const View& p, int64_t batch, int64_t width, int wanted) {
  return !p.data || (p.dims == 2 && p.shape[0] == batch && p.shape[1] == width && p.strides[1] == 1 && dtype(p) == wanted);
}

// The parameters' dtype: that of x or float32, and of all that are given the same.
int shared_dtype(Call& call, const View& x, const View& first, const View& second) {
  const int found = first.data ? dtype(first) : second.data ? dtype(second) : dtype(x);
  call.require(found == dtype(x) || found == BLIP3O_FLOAT32);
  return found;
}

// A result that Python will own; `data` is where it lies, null if there is none, then Python knows the reason.
struct Result {
  Object object;
  DLTensor tensor{};
  explicit Result(Object made) : object(made) {
    if (object && known->torch->tensor_from_object(object, &tensor)) {
      Py_DecRef(object);
      object = nullptr;
    }
  }
};

Result like(Object x, const View& tensor) {
  const bool large = count(tensor) * (tensor.bits / 8) >= LARGE;
  return Result(PyObject_CallFunctionObjArgs(large ? known->large_like : known->empty_like, x, nullptr));
}

Object tuple_of(const int64_t* values, int number) {
  const Object tuple = PyTuple_New(number);
  for (int i = 0; tuple && i < number; ++i) PyTuple_SetItem(tuple, i, PyLong_FromLongLong(values[i]));
  return tuple;
}

Result shaped(Object x, const int64_t* shape, int dims) {
  const Object tuple = tuple_of(shape, dims);
  const Object made = tuple ? PyObject_CallFunctionObjArgs(known->new_empty, x, tuple, nullptr) : nullptr;
  if (tuple) Py_DecRef(tuple);
  return Result(made);
}

// Like x [B, H, T, K] but `width` wide, dense in memory as [B, T, H, width].
Result tokens_first(Object x, int64_t width) {
  const Object number = PyLong_FromLongLong(width);
  const Object made = number ? PyObject_CallFunctionObjArgs(known->tokens_first, x, number, nullptr) : nullptr;
  if (number) Py_DecRef(number);
  return Result(made);
}

// float32 numbers: a tensor of its own, or memory of memory.py's `scratch`.
Result floats(const int64_t* shape, int dims, bool lent = false) {
  const Object tuple = tuple_of(shape, dims);
  const Object made = tuple ? PyObject_Call(lent ? known->scratch : known->empty, tuple, lent ? nullptr : known->float32) : nullptr;
  if (tuple) Py_DecRef(tuple);
  return Result(made);
}

Result floats(int64_t number, bool lent = false) { return floats(&number, 1, lent); }

// A tuple of results, which it takes over; null if one of them is.
Object together(Object const* results, int number) {
  Object tuple = PyTuple_New(number);
  bool whole = tuple;
  for (int i = 0; i < number; ++i) {
    whole = whole && results[i];
    if (tuple && results[i])
      PyTuple_SetItem(tuple, i, results[i]);
    else if (results[i])
      Py_DecRef(results[i]);
  }
  if (whole) return tuple;
  if (tuple) Py_DecRef(tuple);
  return nullptr;
}

Object nothing() {
  Py_IncRef(known->none);
  return known->none;
}

// `result`, unless the library refused: then the ordinary way says so.
Object finished(int status, Object result) {
  if (!status) return result;
  Py_DecRef(result);
  return nothing();
}

}  // namespace

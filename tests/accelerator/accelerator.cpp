// An accelerator that is none, for tests where there is no GPU. Its memory and arithmetic are the CPU's, but to torch it
// is another device: tensors of both in one operation are an error, as on a GPU, backward passes run in a thread of
// their own, random numbers come from its own generator, and, like Apple's GPUs, it has no float64. `relax` gives it
// float64, and lets it take generators of the CPU. It counts how often the program waits for a number of it.

#include <cstring>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::Device;
using c10::Stream;
using std::optional;

constexpr auto kType = c10::DeviceType::PrivateUse1;
const Device kDevice(kType, 0);
const c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);
int64_t reads = 0, waits = 0;     // of numbers by the program, and for all work
bool strict = true;
thread_local bool inside = false; // an operation

void refuse_float64(at::ScalarType type) {
  TORCH_CHECK_TYPE(!strict || type != at::kDouble, "this accelerator has no float64");
}

// -- the device: one, with one stream, whose work is done at once
struct Memory final : at::Allocator {
  at::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    return {data, data, &c10::free_cpu, kDevice};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t size) const override { default_copy_data(to, from, size); }
};
Memory memory;
REGISTER_ALLOCATOR(kType, &memory);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Stream stream() { return Stream(Stream::DEFAULT, kDevice); }
  c10::DeviceType type() const override { return kType; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Device exchangeDevice(Device) const override { return kDevice; }
  Device getDevice() const override { return kDevice; }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getDefaultStream(Device) const override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeDevice(const c10::DeviceIndex) const override { waits++; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

at::Generator& generator() {
  static at::Generator own = at::detail::createCPUGenerator(7);
  return own;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return generator(); }
  Device getDeviceFromPtr(void*) const override { return kDevice; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const { return true; }
  bool isAvailable() const { return true; }
};
[[maybe_unused]] const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// -- tensors
Tensor empty(IntArrayRef size, optional<at::ScalarType> type, optional<at::Layout>, optional<Device>, optional<bool>,
             optional<at::MemoryFormat> format) {
  refuse_float64(c10::dtype_or_default(type));
  return at::detail::empty_generic(size, &memory, kKeys, c10::dtype_or_default(type), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, optional<at::ScalarType> type, optional<at::Layout>,
                     optional<Device>, optional<bool>) {
  refuse_float64(c10::dtype_or_default(type));
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, c10::dtype_or_default(type));
}

// Return a tensor of the CPU in the same memory.
Tensor here(const Tensor& t) {
  if (!t.defined() || t.device().type() != kType) return t;
  auto count = static_cast<int64_t>(t.storage().nbytes() / t.itemsize());
  auto all = at::from_blob(const_cast<void*>(t.storage().data()), {count}, at::TensorOptions(t.dtype()));
  return all.as_strided(t.sizes(), t.strides(), t.storage_offset());
}

// Return a copy on the device.
Tensor there(const Tensor& t) { return t.defined() ? t.to(kDevice) : t; }

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.device().type() == kType) {
    reads += to.device().type() != kType && !inside;
    refuse_float64(to.scalar_type()); // since the type changes before the copy
  }
  here(to).copy_(here(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& t) {
  reads += !inside;
  return here(t).item();
}

const Tensor& resize_(const Tensor& t, c10::SymIntArrayRef size, optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto bytes = static_cast<size_t>(c10::multiply_integers(sizes) + t.storage_offset()) * t.itemsize();
  if (bytes > t.storage().nbytes()) {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), t.storage().data(), t.storage().nbytes());
    t.storage().set_data_ptr_noswap(std::move(data));
    t.storage().set_nbytes(bytes);
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return t;
}

void check_one_device(const Tensor& a, const Tensor& b, const char* operation) {
  TORCH_CHECK(a.device() == b.device(), "Expected all tensors to be on the same device, in ", operation);
}

Tensor convolution(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias, IntArrayRef stride,
                   IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef more, int64_t groups) {
  check_one_device(x, weight, "convolution");
  auto own = bias.has_value() && bias->defined() ? optional<Tensor>(here(*bias)) : std::nullopt;
  return there(at::convolution(here(x), here(weight), own, stride, padding, dilation, transposed, more, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& gradient, const Tensor& x, const Tensor& weight,
                                                        IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                                        bool transposed, IntArrayRef more, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  int64_t outputs = transposed ? weight.size(1) * groups : weight.size(0);
  auto [dx, dw, db] = at::convolution_backward(here(gradient), here(x), here(weight), IntArrayRef({outputs}), stride,
                                               padding, dilation, transposed, more, groups, wanted);
  return {there(dx), there(dw), there(db)};
}

// -- all other operations: the CPU's, if everything is on the device
template <class F>
c10::IValue mapped(const c10::IValue& value, F f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> all;
    for (const Tensor& each : value.toTensorVector()) all.push_back(f(each));
    return all;
  }
  if (value.isOptionalTensorList()) {
    c10::List<optional<Tensor>> all;
    for (const auto& each : value.toOptionalTensorVector())
      all.push_back(each.has_value() ? optional<Tensor>(f(*each)) : std::nullopt);
    return all;
  }
  return value;
}

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto &arguments = schema.arguments(), &returns = schema.returns();
  const std::vector<c10::IValue> given(stack->end() - arguments.size(), stack->end());
  const bool indexes = schema.name().find("index") != std::string::npos; // which takes indices of the CPU, too
  bool own = false, foreign = false, out = schema.name() == "aten::resize_as_";
  for (size_t i = 0; i < given.size(); i++) {
    mapped(given[i], [&](const Tensor& t) {
      own |= t.defined() && t.device().type() == kType;
      foreign |= t.defined() && t.device().type() != kType && t.dim() > 0;
      return t;
    });
    out |= arguments[i].is_out();
    auto& value = (*stack)[stack->size() - given.size() + i];
    if (arguments[i].type()->str().find("Generator") == std::string::npos) continue;
    TORCH_CHECK(!strict || value.isNone() || value.toGenerator() == generator(), "Expected a generator of the device");
    if (value.isNone()) value = generator();
  }
  TORCH_CHECK(indexes || !(own && foreign), "Expected all tensors to be on the same device, in ", schema.name());
  struct Inside {
    bool before = std::exchange(inside, true);
    ~Inside() { inside = before; }
  } guard;
  if (out) return at::native::cpu_fallback(op, stack); // which may resize what it writes
  for (auto value = stack->end() - given.size(); value != stack->end(); ++value)
    *value = value->isDevice() ? c10::IValue(Device(at::kCPU)) : mapped(*value, here);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = 0; i < returns.size(); i++) {
    auto& value = (*stack)[stack->size() - returns.size() + i];
    const auto* alias = returns[i].alias_info();
    if (alias == nullptr || !alias->isWrite()) value = mapped(value, there);
    else
      for (size_t k = 0; k < given.size(); k++)
        if (arguments[k].alias_info() != nullptr && *arguments[k].alias_info() == *alias) value = given[k];
  }
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("resize_", &resize_);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, at::Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

TORCH_LIBRARY(accelerator, m) {
  m.def("reads", []() { return reads; });
  m.def("waits", []() { return waits; });
  m.def("relax", []() { strict = false; });
  m.def("get_state", []() { return generator().get_state(); });
  m.def("set_state", [](const Tensor& state) { generator().set_state(state); });
  m.def("seed", [](int64_t seed) { generator().set_current_seed(seed); });
}

} // namespace

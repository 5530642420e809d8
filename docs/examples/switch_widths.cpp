// Runs an ONNX file of slimmable.export at all its widths in turn, and prints the latencies.
// g++ -std=c++17 switch_widths.cpp -o switch_widths \
//     -I onnxruntime/include -L onnxruntime/lib -l onnxruntime
#include <onnxruntime_cxx_api.h>

#include <chrono>
#include <cstdio>
#include <vector>

int main(int, char** arguments) {
  Ort::Env env;
  Ort::Session session(env, arguments[1], Ort::SessionOptions{});
  Ort::AllocatorWithDefaultOptions allocator;
  auto metadata = session.GetModelMetadata();
  auto widths = metadata.LookupCustomMetadataMapAllocated("slimmable.widths", allocator);
  std::printf("widths %s\n", widths.get());
  std::int64_t count = 1;  // one more than the commas between them
  for (const char* each = widths.get(); *each; ++each) count += *each == ',';

  auto input = session.GetInputNameAllocated(0, allocator);
  auto output = session.GetOutputNameAllocated(0, allocator);
  auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  std::size_t elements = 1;
  for (auto& size : shape) elements *= size = size < 0 ? 1 : size;  // one image
  std::vector<float> image(elements, 0.5f);
  auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const char *inputs[] = {input.get(), "width"}, *outputs[] = {output.get()};
  for (std::int64_t call = 0; call < 10 * count; ++call) {
    std::int64_t position = call % count;  // the next call may have another width
    Ort::Value values[] = {
        Ort::Value::CreateTensor<float>(
            memory, image.data(), elements, shape.data(), shape.size()),
        Ort::Value::CreateTensor<std::int64_t>(memory, &position, 1, nullptr, 0)};
    auto start = std::chrono::steady_clock::now();
    session.Run(Ort::RunOptions{}, inputs, values, 2, outputs, 1);
    std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    std::printf("position %d: %.2f ms\n", int(position), time.count());
  }
}

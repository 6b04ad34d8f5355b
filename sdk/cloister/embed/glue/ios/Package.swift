// swift-tools-version:5.9
import PackageDescription

let package = Package(
  name: "CloisterChat",
  platforms: [.iOS(.v17)],
  products: [.library(name: "CloisterChat", targets: ["CloisterChat"])],
  dependencies: [
    .package(url: "https://github.com/pytorch/executorch.git", branch: "swiftpm-1.4.1")
  ],
  targets: [
    .target(
      name: "CloisterChat",
      dependencies: [
        .product(name: "executorch", package: "executorch"),
        .product(name: "executorch_llm", package: "executorch"),
        .product(name: "backend_xnnpack", package: "executorch"),
        .product(name: "kernels_llm", package: "executorch"),
        .product(name: "kernels_optimized", package: "executorch"),
        .product(name: "kernels_quantized", package: "executorch"),
      ],
      resources: [.copy("PrivacyInfo.xcprivacy")],
      // Backends and kernels register themselves when loaded; a linker drops them otherwise.
      linkerSettings: [.unsafeFlags(["-Wl,-all_load"])]
    )
  ]
)

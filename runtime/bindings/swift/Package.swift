// swift-tools-version:5.9
import PackageDescription

// libdmd_capi of runtime/capi is linked: on a desktop `swift build -Xlinker -L<its folder>`, in an app the static library
// `libdmd_capi.a` of each platform, joined by `xcodebuild -create-xcframework`.
let package = Package(
    name: "DmdRuntime",
    platforms: [.macOS(.v12), .iOS(.v15)],
    products: [.library(name: "DmdRuntime", targets: ["DmdRuntime"])],
    targets: [
        .systemLibrary(name: "CDmd"),
        .target(name: "DmdRuntime", dependencies: ["CDmd"]),
        .testTarget(name: "DmdRuntimeTests", dependencies: ["DmdRuntime"]),
    ]
)

//! Segments that a kernel with pages of 16 KB can map: Android asks for them since version 15, on its devices and, for
//! x86-64, in its emulator.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let target = |key: &str| std::env::var(format!("CARGO_CFG_TARGET_{key}")).unwrap_or_default();
    // On x86-64 anywhere, where it costs some bytes, so that a test on a desktop sees it.
    if target("OS") == "android" || (target("OS") == "linux" && target("ARCH") == "x86_64") {
        println!("cargo::rustc-cdylib-link-arg=-Wl,-z,max-page-size=16384");
    }
}

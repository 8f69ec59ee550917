//! Compiles the CUDA kernels to PTX, where the feature `cuda` asks for them.

fn main() {
    #[cfg(feature = "cuda")]
    {
        let out = std::path::PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
        let kernels = "src/ops/gpu/kernels";
        println!("cargo::rerun-if-changed={kernels}");
        let ptx = cudaforge::KernelBuilder::new()
            .source_dir(kernels)
            .watch([kernels])
            .arg("-std=c++17")
            .arg("-O3")
            .build_ptx()
            .and_then(|ptx| ptx.write(out.join("ptx.rs")));
        if let Err(error) = ptx {
            panic!("the CUDA kernels do not compile: {error}");
        }
    }
}

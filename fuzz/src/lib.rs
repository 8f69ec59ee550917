//! What the fuzz targets share. A target is one reader of bytes from outside: whatever the bytes are, it gives an answer
//! or an error, soon and in little memory. libFuzzer ends the process on a panic, a signal, too much time or memory.

use std::sync::Once;

use dmd_runtime::{EngineChoice, Generator, Info, Options, Request};

#[cfg(feature = "models")]
mod folders;
#[cfg(feature = "models")]
pub use folders::{load_folder, with_file, with_replaced};
#[path = "../../runtime/tests/common/mod.rs"]
pub mod tiny;

/// The most values that a fuzzed graph may compute in one place: what is larger is right to take its time.
const MAX_VALUES: usize = 1 << 16;

/// Reads a model's bytes and, where it may run and is small, runs it in tract.
pub fn load_and_run(bytes: &[u8]) {
    static QUIET: Once = Once::new();
    // libFuzzer's own hook ends the process at once, but the runtime catches what tract throws. What nobody catches still
    // ends it.
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| {})));
    let Ok(info) = Info::from_bytes(bytes) else { return };
    if info.file.largest_value * info.batch > MAX_VALUES {
        return;
    }
    let options = Options { engine: EngineChoice::Tract, threads: Some(1), ..Options::default() };
    if let Ok(generator) = Generator::from_bytes(bytes, options) {
        drop(generator.generate(&Request::default()));
    }
}

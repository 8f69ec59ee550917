//! Files opened, described, run and closed.

use std::ffi::{c_char, c_void};
use std::path::PathBuf;

use dmd_runtime as runtime;
use dmd_runtime::{Buffer, EngineChoice, Error, Label};

use crate::handles::Handles;
use crate::memory::{self, Versioned};
use crate::status::{Failure, Result, Status, bad_argument, border};

/// An open file, ready to make pictures from any number of threads at once. 0 is none. Numbers are never given out twice in
/// a process, so that one which was closed is an error wherever it is used.
pub type Generator = u64;

/// Cancels a request, and tells how far it is. 0 is none.
pub type Watch = u64;

/// Called at the beginning of a request and after each pass of each part of it, on the thread that makes the pictures, with
/// the watch's context: of `total` passes of all pictures together `done` are done. It must return (no longjmp, no C++
/// exception); it may call any function of this library.
pub type OnProgress = Option<extern "C" fn(context: *mut c_void, done: usize, total: usize)>;

/// Which engine runs a file.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// ONNX Runtime where its library is found, else tract, which is slower; the JSON's `engine.warning` then says so.
    Auto = 0,
    /// ONNX Runtime.
    OnnxRuntime = 1,
    /// tract, which is in this library and needs no other.
    Tract = 2,
}

/// How a file is run.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// `sizeof(dmd_options)`.
    pub size: usize,
    /// Threads within one operator; 0 for as many as the machine offers.
    pub threads: usize,
    /// ONNX Runtime's library, or the folder that holds it; null searches: the variable ORT_DYLIB_PATH, beside the program,
    /// the cache folder, Python's packages, the system.
    pub library: *const c_char,
    /// A `dmd_engine`.
    pub engine: u32,
    /// 1 where an accelerator of the list must run every node; 0 where the processor runs what they leave, or all.
    pub require_accelerator: u32,
    /// What may run the graph in the place of the processor, in the order in which they are asked: a JSON array, or null for
    /// none. docs/runtime.md has its words; `dmd_describe_json` tells which was taken, and why not the others.
    pub accelerators: *const c_char,
    /// 1 where ONNX Runtime is to hold less memory, for a quarter more time; 0 otherwise.
    pub low_memory: u32,
}

/// Which pictures to make.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// `sizeof(dmd_request)`.
    pub size: usize,
    /// Picture `i` depends on the seed, on `i` and on its label, not on the batch it is made in.
    pub seed: u64,
    /// The number of pictures, 1 at least, which may differ from the file's own batch.
    pub batch: usize,
    /// `n_labels` classes: one for all pictures, or one for each. Null with `n_labels` 0: a generator with classes goes
    /// through them in turn.
    pub labels: *const i64,
    /// 0, 1 or `batch`.
    pub n_labels: usize,
    /// A watch, or 0.
    pub watch: Watch,
}

/// What a file says of itself.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// `sizeof(dmd_info)`.
    pub size: usize,
    /// Colours of a picture: 1 for grey, 3 for red, green and blue.
    pub channels: usize,
    /// Rows of a picture.
    pub height: usize,
    /// Columns of a picture.
    pub width: usize,
    /// Pictures in one call of the engine; a request may be for any number.
    pub batch: usize,
    /// Classes; 0 where the file takes no labels.
    pub n_classes: usize,
    /// Passes that make a picture.
    pub n_passes: usize,
}

// SAFETY: all three begin with their size, and numbers and pointers may have any bytes.
unsafe impl Versioned for Options {
    const NAME: &'static str = "dmd_options";
    const FIRST_SIZE: usize = size_of::<Self>();
}
unsafe impl Versioned for Request {
    const NAME: &'static str = "dmd_request";
    const FIRST_SIZE: usize = size_of::<Self>();
}
unsafe impl Versioned for Info {
    const NAME: &'static str = "dmd_info";
    const FIRST_SIZE: usize = size_of::<Self>();
}

static GENERATORS: Handles<runtime::Generator> = Handles::of("generator");
static WATCHES: Handles<runtime::Watch> = Handles::of("watch");

/// Opens a file that `dmd export --onnx` or `dmd ort` wrote. `options` may be null: ONNX Runtime where it is found, all
/// threads. The handle in `*generator` is the caller's, to close by `dmd_close`; on failure it is 0.
///
/// # Safety
///
/// `path` is null or a text, `options` null or such a struct, `generator` null or room for a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_open(path: *const c_char, options: *const Options, generator: *mut Generator) -> Status {
    // SAFETY: as the caller's.
    border(|| unsafe {
        memory::write(generator, 0, "generator")?;
        let path = memory::required_text(path, "path")?;
        let opened = runtime::Generator::load(path, read_options(options)?)?;
        memory::write(generator, GENERATORS.insert(opened), "generator")
    })
}

/// Opens the `n` bytes of such a file, whose weights must be in it: an asset, or what an app was linked with. The bytes are
/// copied as far as they are needed. Otherwise as `dmd_open`.
///
/// # Safety
///
/// `bytes` is null or points to `n` bytes; the rest as of `dmd_open`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_open_bytes(
    bytes: *const u8,
    n: usize,
    options: *const Options,
    generator: *mut Generator,
) -> Status {
    // SAFETY: as the caller's.
    border(|| unsafe {
        memory::write(generator, 0, "generator")?;
        let bytes = memory::slice(bytes, n, "bytes")?;
        let opened = runtime::Generator::from_bytes(bytes, read_options(options)?)?;
        memory::write(generator, GENERATORS.insert(opened), "generator")
    })
}

/// Closes a generator. Its memory is freed now, or by the last call on another thread that is using it. Closing it again is
/// an error, `DMD_STATUS_BAD_HANDLE`, and does nothing.
#[unsafe(no_mangle)]
pub extern "C" fn dmd_close(generator: Generator) -> Status {
    border(|| GENERATORS.remove(generator))
}

/// Runs the engine once and throws the output away, so that the first picture need not wait for what an engine does once.
#[unsafe(no_mangle)]
pub extern "C" fn dmd_warm_up(generator: Generator) -> Status {
    border(|| Ok(GENERATORS.get(generator)?.warm_up()?))
}

/// Writes what the file says of itself into `*info`, whose `size` is set.
///
/// # Safety
///
/// `info` is null or such a struct.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_describe(generator: Generator, info: *mut Info) -> Status {
    border(|| {
        let generator = GENERATORS.get(generator)?;
        let found = generator.info();
        let described = Info {
            size: size_of::<Info>(),
            channels: found.channels,
            height: found.height,
            width: found.width,
            batch: found.batch,
            n_classes: found.classes.len(),
            n_passes: found.sigmas.len(),
        };
        // SAFETY: as the caller's.
        unsafe { memory::write_struct(info, described) }
    })
}

/// Writes all that is known as JSON: `{"file": {…}, "engine": {…}, "placement": {…}}`: the file's
/// description, the engine, and which accelerator runs it, how that was proven, and why no other does.
///
/// # Safety
///
/// `buffer` is null or room for `size` bytes, `needed` null or room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_describe_json(
    generator: Generator,
    buffer: *mut c_char,
    size: usize,
    needed: *mut usize,
) -> Status {
    border(|| {
        let generator = GENERATORS.get(generator)?;
        let json = serde_json::json!({ "file": generator.info(), "engine": generator.engine(),
            "placement": generator.placement() });
        // SAFETY: as the caller's.
        unsafe { memory::give_text(&json.to_string(), buffer, size, needed) }
    })
}

/// Writes, as a JSON array, which engines there are here, their versions, and of each that cannot be used the reason.
/// `library` is as in `dmd_options`, and may be null.
///
/// # Safety
///
/// `library` is null or a text; the rest as of `dmd_describe_json`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_engines_json(
    library: *const c_char,
    buffer: *mut c_char,
    size: usize,
    needed: *mut usize,
) -> Status {
    // SAFETY: as the caller's.
    border(|| unsafe {
        let engines = runtime::engines(memory::text(library, "library")?.map(std::path::Path::new));
        memory::give_text(&serde_json::json!(engines).to_string(), buffer, size, needed)
    })
}

/// Writes the name of a class, from 0 to `n_classes - 1`.
///
/// # Safety
///
/// As of `dmd_describe_json`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_class_name(
    generator: Generator,
    label: i64,
    buffer: *mut c_char,
    size: usize,
    needed: *mut usize,
) -> Status {
    border(|| {
        let generator = GENERATORS.get(generator)?;
        let classes = &generator.info().classes;
        let name = usize::try_from(label).ok().and_then(|label| classes.get(label));
        let name = name.ok_or(Error::Label { label, classes: classes.len() })?;
        // SAFETY: as the caller's.
        unsafe { memory::give_text(name, buffer, size, needed) }
    })
}

/// Finds the class with this name, or this number in digits.
///
/// # Safety
///
/// `name` is null or a text, `label` null or room for a number.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_find_class(generator: Generator, name: *const c_char, label: *mut i64) -> Status {
    // SAFETY: as the caller's.
    border(|| unsafe {
        let generator = GENERATORS.get(generator)?;
        let name = memory::required_text(name, "name")?;
        let found = generator.info().class(name);
        let classes = || generator.info().classes.clone();
        let found = found.ok_or_else(|| Error::NoSuchClass { name: name.into(), classes: classes() })?;
        memory::write(label, found as i64, "label")
    })
}

/// Makes pictures as f32 `(batch, channels, height, width)`, about [-1, 1]. `n` is the number of values, no more and no less.
///
/// # Safety
///
/// `request` is null or such a struct whose labels are as many as it says, `values` null or room for `n` values that
/// nobody else uses during the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_generate_f32(
    generator: Generator,
    request: *const Request,
    values: *mut f32,
    n: usize,
) -> Status {
    // SAFETY: as the caller's.
    border(|| unsafe { generate(generator, request, Buffer::F32(memory::slice_mut(values, n, "values")?)) })
}

/// Makes pictures as bytes `(batch, height, width, channels)`. `n` is the number of bytes, no more and no less.
///
/// # Safety
///
/// As of `dmd_generate_f32`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_generate_u8(
    generator: Generator,
    request: *const Request,
    pixels: *mut u8,
    n: usize,
) -> Status {
    // SAFETY: as the caller's.
    border(|| unsafe { generate(generator, request, Buffer::U8(memory::slice_mut(pixels, n, "pixels")?)) })
}

/// Makes pictures as bytes `(batch, height, width, 4)`, red, green, blue and alpha, as screens take them; of a file of 1 to
/// 4 channels. Opaque where the file has no alpha. `n` is the number of bytes, no more and no less.
///
/// # Safety
///
/// As of `dmd_generate_f32`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_generate_rgba(
    generator: Generator,
    request: *const Request,
    pixels: *mut u8,
    n: usize,
) -> Status {
    // SAFETY: as the caller's.
    border(|| unsafe { generate(generator, request, Buffer::Rgba(memory::slice_mut(pixels, n, "pixels")?)) })
}

/// Makes pictures of the caller's own unit normal noise, f32 `(batch, channels, height, width)`, as f32 of the same size:
/// `n` values each. `labels` are one for each picture, or none (null, 0) where the file has no classes. `seed` is that of the
/// noise between the passes of a file of several.
///
/// # Safety
///
/// `noise` and `labels` are null or as many as is said, `values` null or room for `n` values that nobody else uses during
/// the call, and that are not the noise.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_run(
    generator: Generator,
    noise: *const f32,
    labels: *const i64,
    n_labels: usize,
    seed: u64,
    values: *mut f32,
    n: usize,
) -> Status {
    // SAFETY: as the caller's.
    border(|| unsafe {
        let generator = GENERATORS.get(generator)?;
        let noise = memory::slice(noise, n, "noise")?;
        let labels = memory::slice(labels, n_labels, "labels")?;
        let values = memory::slice_mut(values, n, "values")?;
        let info = generator.info();
        let of_each = info.channels * info.height * info.width;
        if !n.is_multiple_of(of_each) {
            let reason = format!("noise has {n} values, expected a multiple of {of_each}, those of one picture");
            return Err(Failure(Status::BadRequest, reason));
        }
        let shape = (n / of_each, info.channels, info.height, info.width);
        let noise = ndarray::ArrayView4::from_shape(shape, noise).expect("the shape has as many values");
        let images = generator.run_seeded(noise, labels, seed)?.to_f32();
        values.copy_from_slice(images.as_slice().expect("a fresh array is contiguous"));
        Ok(())
    })
}

/// Makes a watch for requests. `on_progress` may be null, for one that only cancels; `context` is handed to it as it is. The
/// handle in `*watch` is the caller's, to close by `dmd_close_watch`; on failure it is 0.
///
/// # Safety
///
/// `on_progress` may be called with `context` on any thread that makes pictures with this watch, until the last of these
/// requests has returned. `watch` is null or room for a handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dmd_open_watch(on_progress: OnProgress, context: *mut c_void, watch: *mut Watch) -> Status {
    struct Context(*mut c_void);
    // SAFETY: the caller promises that its function may have it on any thread.
    unsafe impl Send for Context {}
    unsafe impl Sync for Context {}
    impl Context {
        fn get(&self) -> *mut c_void {
            self.0
        }
    }
    border(|| {
        let context = Context(context);
        let made = match on_progress {
            None => runtime::Watch::new(),
            Some(call) => runtime::Watch::on_progress(move |at| call(context.get(), at.done, at.total)),
        };
        // SAFETY: as the caller's.
        unsafe {
            memory::write(watch, 0, "watch")?;
            memory::write(watch, WATCHES.insert(made), "watch")
        }
    })
}

/// Cancels every request with this watch: each ends with `DMD_STATUS_CANCELLED`, after the pass that is under way, whose result is
/// dropped; no accelerator stops within a pass. A request that is begun later with it ends at once.
#[unsafe(no_mangle)]
pub extern "C" fn dmd_cancel(watch: Watch) -> Status {
    border(|| {
        WATCHES.get(watch)?.cancel();
        Ok(())
    })
}

/// Closes a watch. A request that is under way keeps it, and can no longer be cancelled.
#[unsafe(no_mangle)]
pub extern "C" fn dmd_close_watch(watch: Watch) -> Status {
    border(|| WATCHES.remove(watch))
}

/// # Safety
///
/// `request` is null or a struct whose labels are as many as it says.
unsafe fn generate(generator: Generator, request: *const Request, into: Buffer<'_>) -> Result<()> {
    let generator = GENERATORS.get(generator)?;
    // SAFETY: as the caller's.
    let (request, labels) = unsafe {
        let request = memory::read_struct(request)?;
        (request, memory::slice(request.labels, request.n_labels, "dmd_request.labels")?)
    };
    let classes = generator.info().classes.len();
    let label =
        |label: &i64| Ok(Label::Index(usize::try_from(*label).map_err(|_| Error::Label { label: *label, classes })?));
    let labels = labels.iter().map(label).collect::<Result<_>>()?;
    let watch = if request.watch == 0 { None } else { Some((*WATCHES.get(request.watch)?).clone()) };
    let request = runtime::Request { seed: request.seed, batch: request.batch, labels, watch };
    Ok(generator.generate_into(&request, into)?)
}

/// # Safety
///
/// `options` is null or such a struct whose library is null or a text.
unsafe fn read_options(options: *const Options) -> Result<runtime::Options> {
    if options.is_null() {
        return Ok(runtime::Options::default());
    }
    // SAFETY: as the caller's.
    let (options, library, accelerators) = unsafe {
        let options = memory::read_struct(options)?;
        let library = memory::text(options.library, "dmd_options.library")?;
        (options, library, memory::text(options.accelerators, "dmd_options.accelerators")?)
    };
    let accelerators = serde_json::from_str(accelerators.unwrap_or("[]"))
        .or_else(|error| bad_argument(format!("dmd_options.accelerators is no list of accelerators: {error}")))?;
    for (name, flag) in [("require_accelerator", options.require_accelerator), ("low_memory", options.low_memory)] {
        if flag > 1 {
            return bad_argument(format!("dmd_options.{name} is {flag}, expected 0 or 1"));
        }
    }
    const ENGINES: [(Engine, EngineChoice); 3] = [
        (Engine::Auto, EngineChoice::Auto),
        (Engine::OnnxRuntime, EngineChoice::OnnxRuntime),
        (Engine::Tract, EngineChoice::Tract),
    ];
    let Some((_, engine)) = ENGINES.into_iter().find(|(engine, _)| *engine as u32 == options.engine) else {
        return bad_argument(format!("dmd_options.engine is {}, expected 0 to 2", options.engine));
    };
    Ok(runtime::Options {
        engine,
        library: library.map(PathBuf::from),
        threads: (options.threads > 0).then_some(options.threads),
        accelerators,
        require_accelerator: options.require_accelerator == 1,
        low_memory: options.low_memory == 1,
    })
}

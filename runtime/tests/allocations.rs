//! After the first call, pictures in the caller's memory cost no allocation of ours. A process of its own, because it counts
//! with the allocator of all; ONNX Runtime has another one, and tract's share is what the bare engine call takes.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use dmd_runtime::{Buffer, EngineChoice, EngineKind, Generator, Options, Request, Watch, engines};

struct Counting;

thread_local! {
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count() {
    // The thread's own count may be gone while it ends.
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: the system's allocator does the work; counting takes no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

fn allocations(call: impl FnOnce()) -> usize {
    let before = COUNT.get();
    call();
    COUNT.get() - before
}

#[test]
fn pictures_in_the_callers_memory_cost_no_allocation() {
    assert_eq!(allocations(|| drop(vec![0u8; 7])), 1, "the counter counts");
    for engine in engines(None).into_iter().filter(|engine| engine.is_present()) {
        let choice = if engine.kind == EngineKind::Tract { EngineChoice::Tract } else { EngineChoice::OnnxRuntime };
        // Chunks that are full and one that is not; several passes; any number of pictures at once; bytes.
        for (name, n, calls) in
            [("classes-f32.onnx", 3, 2), ("classes-u8.onnx", 4, 2), ("steps-f32.onnx", 3, 6), ("format-1.onnx", 1, 1)]
        {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
            let options = Options { engine: choice, threads: Some(1), ..Options::default() };
            let generator = Generator::load(path, options).unwrap();
            let [c, h, w] = generator.info().shape();
            let (mut values, mut pixels, mut rgba) =
                (vec![0.0; n * c * h * w], vec![0; n * c * h * w], vec![0; n * 4 * h * w]);
            let request = Request { seed: 1, batch: n, watch: Some(Watch::new()), ..Request::default() };
            let class = generator.info().classes.first().map(|name| name.as_str().into());
            let named = Request { labels: class.into_iter().collect(), ..request.clone() };
            generator.generate_into(&request, Buffer::F32(&mut values)).unwrap();
            let of_engine = calls * allocations(|| generator.warm_up().unwrap());
            assert!(engine.kind == EngineKind::Tract || of_engine == 0, "{name}: {of_engine} in the engine");
            for request in [&request, &named] {
                for into in [Buffer::F32(&mut values), Buffer::U8(&mut pixels), Buffer::Rgba(&mut rgba)] {
                    let found = allocations(|| generator.generate_into(request, into).unwrap());
                    assert_eq!(found, of_engine, "{name}, {}", engine.kind);
                }
            }
        }
    }
}

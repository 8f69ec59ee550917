//! Calls of the C ABI in any order: on handles that are open, closed, of the other kind or made up, with sizes that fit and
//! that do not. The memory that is lent is always as large as is said; the rest is the library's to check, and the sanitizer's.
#![no_main]

use std::ptr::{null, null_mut};

use dmd_capi::*;

/// A generator of three classes, 3 × 8 × 6.
const MODEL: &[u8] = include_bytes!("../../runtime/tests/fixtures/classes-f32.onnx");

const VALUES: usize = 3 * 8 * 6;

/// Loading takes milliseconds each.
const MOST_OPENED: usize = 2;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| calls(bytes));

fn calls(bytes: &[u8]) {
    let mut bytes = bytes.iter().copied();
    let (mut handles, mut opened) = (vec![0u64, 1, u64::MAX], 0);
    while let Some(call) = bytes.next() {
        let mut next = || bytes.next().unwrap_or(0);
        let handle = handles[usize::from(next()) % handles.len()];
        // Around what one, two or three pictures take, in all layouts.
        let n = (usize::from(next() % 4) * VALUES + usize::from(next() % 3) * VALUES / 3).saturating_sub(usize::from(next() % 2));
        let labels: Vec<i64> = (0..next() % 4).map(|_| i64::from(next()) - 2).collect();
        let text = [next(), next(), 0].map(|byte| byte as i8 as std::ffi::c_char);
        let watch = handles[usize::from(next()) % handles.len()];
        let request = Request {
            size: if next() % 16 == 0 { usize::from(next()) } else { size_of::<Request>() },
            seed: u64::from(next()),
            batch: usize::from(next() % 4),
            labels: if labels.is_empty() { null() } else { labels.as_ptr() },
            n_labels: labels.len(),
            watch: if next() % 2 == 0 { 0 } else { watch },
        };
        // A struct is read as far as it says: here no further than it is.
        let request = if request.size <= size_of::<Request>() { &raw const request } else { null() };
        let (mut values, mut pixels, mut needed, mut label) = (vec![0.0f32; n], vec![0u8; n], 0usize, 0i64);
        let (room, size) = if next() % 4 == 0 { (null_mut(), 0) } else { (pixels.as_mut_ptr(), n) };
        // SAFETY: every pointer is null or to as much as is said, alive for the call.
        unsafe {
            match call % 18 {
                0 if opened < MOST_OPENED => {
                    opened += 1;
                    let flags = [u32::from(next() % 4), u32::from(next() % 3), u32::from(next() % 3)];
                    let options = Options {
                        size: size_of::<Options>(),
                        threads: usize::from(next() % 3),
                        library: c"/nowhere".as_ptr(),
                        engine: if flags[0] == 3 { 9 } else { 2 },
                        require_accelerator: flags[1] / 2,
                        accelerators: if next() % 4 == 0 { text.as_ptr() } else { null() },
                        low_memory: flags[2],
                    };
                    let whole = if next() % 4 == 0 { n.min(MODEL.len()) } else { MODEL.len() };
                    let mut generator = 0;
                    dmd_open_bytes(MODEL.as_ptr(), whole, &options, &mut generator);
                    handles.push(generator);
                }
                1 => {
                    let mut watch = 0;
                    dmd_open_watch(None, null_mut(), &mut watch);
                    handles.push(watch);
                }
                2 => _ = dmd_close(handle),
                3 => _ = dmd_close_watch(handle),
                4 => _ = dmd_cancel(handle),
                5 => _ = dmd_warm_up(handle),
                6 => {
                    let mut info = std::mem::zeroed::<Info>();
                    info.size = if next() % 4 == 0 { usize::from(next() % 8) } else { size_of::<Info>() };
                    dmd_describe(handle, &mut info);
                }
                7 => _ = dmd_describe_json(handle, room.cast(), size, &mut needed),
                8 => _ = dmd_class_name(handle, i64::from(next()) - 2, room.cast(), size, &mut needed),
                9 => _ = dmd_find_class(handle, text.as_ptr(), &mut label),
                10 => _ = dmd_generate_f32(handle, request, values.as_mut_ptr(), n),
                11 => _ = dmd_generate_u8(handle, request, room, size),
                12 => _ = dmd_generate_rgba(handle, request, room, size),
                13 => {
                    let noise = vec![f32::from(next()) - 128.0; n];
                    dmd_run(handle, noise.as_ptr(), labels.as_ptr(), labels.len(), 0, values.as_mut_ptr(), n);
                }
                14 => _ = dmd_noise(u64::from(next()), u32::from(next()), u64::from(next()), values.as_mut_ptr(), n),
                15 => {
                    let [height, width, channels] = [next() % 9, next() % 9, next() % 6].map(u32::from);
                    let picture = vec![7u8; (height * width * channels) as usize];
                    dmd_png(picture.as_ptr(), height, width, channels, room, size, &mut needed);
                }
                16 => _ = std::ffi::CStr::from_ptr(dmd_last_error()).to_bytes(),
                _ => handles.truncate(40),
            }
        }
    }
    // What is still open would be there for the next input.
    handles.into_iter().for_each(|handle| _ = (dmd_close(handle), dmd_close_watch(handle)));
}

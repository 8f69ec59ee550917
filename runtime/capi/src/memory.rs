//! The caller's memory: pointers that may be null, misaligned or have a wrong size beside them, and structs and texts behind
//! them. Everything unsafe of the ABI is here; what cannot be seen from inside (memory that is shorter than it is said to
//! be, or freed) is the caller's promise.

use std::ffi::{CStr, c_char};

use crate::status::{Failure, Result, Status, bad_argument};

/// A struct that begins with its own size in bytes. Zero bytes are a valid value, and the default one.
///
/// # Safety
///
/// `repr(C)`, the first field is the size as a `usize`, and any bytes are valid.
pub unsafe trait Versioned: Copy {
    /// Its name in C.
    const NAME: &'static str;
    /// Its size in the first version of the ABI, in which it appeared.
    const FIRST_SIZE: usize;
}

/// Larger than any struct will be: a size beyond it is no size, but something else.
const MAX_STRUCT: usize = 4096;

/// Reads a struct of the caller's, of this version, an older or a newer one. Fields that the caller's version does not have
/// are zero; those that ours does not have must be.
///
/// # Safety
///
/// `pointer` is null or points to a struct of the size that it begins with.
pub unsafe fn read_struct<T: Versioned>(pointer: *const T) -> Result<T> {
    // SAFETY: as the caller's.
    let size = unsafe { size_of_struct(pointer)? };
    let ours = size_of::<T>();
    // SAFETY: the caller promises `size` bytes; the trait, that any bytes and zeros are valid.
    unsafe {
        let newer = std::slice::from_raw_parts(pointer.cast::<u8>().wrapping_add(ours), size.saturating_sub(ours));
        if newer.iter().any(|byte| *byte != 0) {
            return bad_argument(format!(
                "{} has {size} bytes, and fields that this library (of {ours} bytes) does not know are set: update it",
                T::NAME
            ));
        }
        let mut value: T = std::mem::zeroed();
        std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut value).cast(), size.min(ours));
        Ok(value)
    }
}

/// Writes a struct of the caller's, of this version, an older or a newer one: as much as it has, zeros beyond what we have,
/// and its own size at its beginning, as it was.
///
/// # Safety
///
/// `pointer` is null or points to a struct of the size that it begins with.
pub unsafe fn write_struct<T: Versioned>(pointer: *mut T, value: T) -> Result<()> {
    // SAFETY: as the caller's.
    let size = unsafe { size_of_struct(pointer)? };
    let known = size.min(size_of::<T>());
    const FIELD: usize = size_of::<usize>();
    // SAFETY: the caller promises `size` bytes.
    unsafe {
        let to = pointer.cast::<u8>();
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>().add(FIELD), to.add(FIELD), known - FIELD);
        std::ptr::write_bytes(to.add(known), 0, size - known);
    }
    Ok(())
}

/// # Safety
///
/// `pointer` is null or points to a size.
unsafe fn size_of_struct<T: Versioned>(pointer: *const T) -> Result<usize> {
    check_pointer(pointer, T::NAME)?;
    // SAFETY: as the caller's, and it is neither null nor misaligned.
    let size = unsafe { pointer.cast::<usize>().read() };
    if !(T::FIRST_SIZE..=MAX_STRUCT).contains(&size) {
        return bad_argument(format!("{}.size is {size}, expected sizeof({}), {}", T::NAME, T::NAME, size_of::<T>()));
    }
    Ok(size)
}

/// The caller's values to read; none where `n` is 0, whatever the pointer.
///
/// # Safety
///
/// `pointer` is null or points to `n` values that nobody writes to during the call.
pub unsafe fn slice<'a, T>(pointer: *const T, n: usize, name: &str) -> Result<&'a [T]> {
    if n == 0 {
        return Ok(&[]);
    }
    check_values(pointer, n, name)?;
    // SAFETY: as the caller's, and the pointer and the size are possible ones.
    Ok(unsafe { std::slice::from_raw_parts(pointer, n) })
}

/// The caller's values to write; none where `n` is 0, whatever the pointer.
///
/// # Safety
///
/// `pointer` is null or points to room for `n` values that nobody else uses during the call.
pub unsafe fn slice_mut<'a, T>(pointer: *mut T, n: usize, name: &str) -> Result<&'a mut [T]> {
    if n == 0 {
        return Ok(&mut []);
    }
    check_values(pointer, n, name)?;
    // SAFETY: as the caller's, and the pointer and the size are possible ones.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, n) })
}

/// Writes one value of the caller's.
///
/// # Safety
///
/// `pointer` is null or points to room for it.
pub unsafe fn write<T>(pointer: *mut T, value: T, name: &str) -> Result<()> {
    check_pointer(pointer, name)?;
    // SAFETY: as the caller's, and it is neither null nor misaligned.
    unsafe { pointer.write(value) };
    Ok(())
}

/// A text of the caller's; `None` where the pointer is null.
///
/// # Safety
///
/// `pointer` is null or points to bytes that a zero byte ends, and that nobody writes to during the call.
pub unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: as the caller's.
    let text = unsafe { CStr::from_ptr(pointer) }.to_str();
    text.map(Some).or_else(|error| bad_argument(format!("{name} is not UTF-8: {error}")))
}

/// As [`text`], where there must be one.
///
/// # Safety
///
/// As of [`text`].
pub unsafe fn required_text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    // SAFETY: as the caller's.
    unsafe { text(pointer, name)? }.map_or_else(|| bad_argument(format!("{name} is null, expected a text")), Ok)
}

/// Gives bytes to a caller who may not know how many there will be: see the header.
///
/// # Safety
///
/// `buffer` is null or points to room for `size` bytes, `needed` is null or points to room for a number.
pub unsafe fn give(bytes: &[u8], buffer: *mut u8, size: usize, needed: *mut usize) -> Result<()> {
    if !needed.is_null() {
        // SAFETY: as the caller's.
        unsafe { write(needed, bytes.len(), "needed")? };
    }
    if buffer.is_null() && size == 0 && !needed.is_null() {
        return Ok(());
    }
    check_values(buffer, size.max(1), "buffer")?;
    if size < bytes.len() {
        let reason = format!("buffer has {size} bytes, expected at least {}", bytes.len());
        return Err(Failure(Status::BufferTooSmall, reason));
    }
    // SAFETY: as the caller's, and the bytes fit.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len()) };
    Ok(())
}

/// [`give`] for a text, which gets its zero byte.
///
/// # Safety
///
/// As of [`give`].
pub unsafe fn give_text(text: &str, buffer: *mut c_char, size: usize, needed: *mut usize) -> Result<()> {
    let text = [text.replace('\0', "\\0").as_bytes(), b"\0"].concat();
    // SAFETY: as the caller's.
    unsafe { give(&text, buffer.cast(), size, needed) }
}

fn check_values<T>(pointer: *const T, n: usize, name: &str) -> Result<()> {
    check_pointer(pointer, name)?;
    match n.checked_mul(size_of::<T>()) {
        Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
        _ => bad_argument(format!("{name} cannot have {n} values: there is no such memory")),
    }
}

fn check_pointer<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return bad_argument(format!("{name} is null"));
    }
    match pointer.is_aligned() {
        true => Ok(()),
        false => bad_argument(format!("{name} is not aligned to {} bytes", align_of::<T>())),
    }
}

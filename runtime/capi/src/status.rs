//! What every function gives back, the reason behind it, and the border that no panic passes.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use dmd_runtime::Error;

/// How a call went.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It did what it says.
    Ok = 0,
    /// A pointer is null or not aligned, a size is wrong, a text is not UTF-8, or a struct is none of this library's.
    BadArgument = 1,
    /// No open generator or watch has this handle: it was closed, or never opened.
    BadHandle = 2,
    /// The caller's buffer is too small for a text or a PNG; what it takes was written to `needed`.
    BufferTooSmall = 3,
    /// The file cannot be read, is broken, or is not one that `dmd export` wrote.
    BadFile = 4,
    /// No engine can run the file: no usable library, one that is too old, or one that refuses the file.
    NoEngine = 5,
    /// The request does not suit the file: a label, a number of pictures, a size of noise or of the pictures' buffer.
    BadRequest = 6,
    /// The engine failed, or gave values that are not finite.
    RunFailed = 7,
    /// The system has no memory for it.
    NoMemory = 8,
    /// Somebody cancelled it.
    Cancelled = 9,
    /// A fault of the library itself, which was stopped at its border; the handle may still be used.
    Panic = 10,
    /// Anything else; the message says what.
    Other = 11,
}

/// A status that is not `DMD_STATUS_OK`, and its reason.
pub struct Failure(pub Status, pub String);

pub type Result<T, E = Failure> = std::result::Result<T, E>;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// The reason why the last function that failed on this thread did so, in one sentence, or an empty text where none has.
/// The text is the library's, and stays until the next failure on this thread or the thread's end: copy it to keep it.
#[unsafe(no_mangle)]
pub extern "C" fn dmd_last_error() -> *const c_char {
    static EMPTY: &CStr = c"";
    // None while the thread ends.
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(EMPTY.as_ptr())
}

/// Runs a function of the ABI: what fails is remembered, and what panics is caught.
pub fn border(run: impl FnOnce() -> Result<()>) -> Status {
    let result = catch_unwind(AssertUnwindSafe(run));
    let Failure(status, reason) = match result {
        Ok(Ok(())) => return Status::Ok,
        Ok(Err(failure)) => failure,
        Err(panic) => Failure(Status::Panic, format!("a fault in dmd-runtime: {}", message(&*panic))),
    };
    let reason = CString::new(reason.replace('\0', "\\0")).unwrap_or_default();
    // Without a place for it, as the thread ends, the status has to do.
    let _ = LAST.try_with(|last| *last.borrow_mut() = reason);
    status
}

/// A wrong argument.
pub fn bad_argument<T>(reason: impl Into<String>) -> Result<T> {
    Err(Failure(Status::BadArgument, reason.into()))
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without a message")
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Io { .. }
            | Error::NotOnnx { .. }
            | Error::NotOurs { .. }
            | Error::NewerFormat { .. }
            | Error::Inconsistent { .. } => Status::BadFile,
            Error::EngineDisabled { .. }
            | Error::NoLibrary { .. }
            | Error::OtherLibraryLoaded { .. }
            | Error::Load { .. }
            | Error::NoAccelerator { .. } => Status::NoEngine,
            Error::Run { .. } | Error::NotFinite { .. } => Status::RunFailed,
            Error::NoMemory { .. } => Status::NoMemory,
            Error::Cancelled => Status::Cancelled,
            Error::EmptyBatch
            | Error::TooLarge { .. }
            | Error::Label { .. }
            | Error::LabelCount { .. }
            | Error::NotLabelled
            | Error::NoSuchClass { .. }
            | Error::NoiseShape { .. }
            | Error::NoiseNotFinite { .. }
            | Error::BufferSize { .. }
            | Error::NoColours { .. } => Status::BadRequest,
            _ => Status::Other,
        };
        Failure(status, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last_error() -> String {
        // SAFETY: a text of this library, read before the next failure.
        unsafe { CStr::from_ptr(dmd_last_error()) }.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_stops_at_the_border_and_leaves_its_message() {
        assert_eq!(last_error(), "");
        assert_eq!(border(|| panic!("at {}", 7)), Status::Panic);
        assert_eq!(last_error(), "a fault in dmd-runtime: at 7");
    }

    #[test]
    fn a_message_stays_until_the_next_failure_of_its_own_thread() {
        assert_eq!(border(|| bad_argument("first\0half")), Status::BadArgument);
        assert_eq!(border(|| Ok(())), Status::Ok);
        std::thread::spawn(|| {
            assert_eq!(last_error(), "");
            assert_eq!(border(|| bad_argument("another thread's")), Status::BadArgument);
        })
        .join()
        .unwrap();
        assert_eq!(last_error(), "first\\0half");
    }
}

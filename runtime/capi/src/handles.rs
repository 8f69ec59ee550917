//! Handles: numbers that are never given out twice in a process, so that one which was closed is known to be. What they
//! stand for is shared with the calls that use it, and outlives its handle until the last of them is done.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::status::{Failure, Result, Status};

/// What is open of one kind.
pub struct Handles<T> {
    kind: &'static str,
    open: Mutex<BTreeMap<u64, Arc<T>>>,
}

/// Of all kinds together, so that one kind's handle is not another's. 0 is none.
static NEXT: AtomicU64 = AtomicU64::new(1);

impl<T> Handles<T> {
    pub const fn of(kind: &'static str) -> Self {
        Self { kind, open: Mutex::new(BTreeMap::new()) }
    }

    pub fn insert(&self, value: T) -> u64 {
        let handle = NEXT.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(handle, Arc::new(value));
        handle
    }

    pub fn get(&self, handle: u64) -> Result<Arc<T>> {
        let found = self.lock().get(&handle).cloned();
        found.ok_or_else(|| self.unknown(handle))
    }

    /// The value is dropped outside of the lock, by who holds it last.
    pub fn remove(&self, handle: u64) -> Result<()> {
        let removed = self.lock().remove(&handle);
        removed.map(drop).ok_or_else(|| self.unknown(handle))
    }

    /// No call panics while it holds the lock: a poisoned one is as good.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<T>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unknown(&self, handle: u64) -> Failure {
        let kind = self.kind;
        Failure(Status::BadHandle, format!("{handle} is no open {kind}: it was closed, or never opened as one"))
    }
}

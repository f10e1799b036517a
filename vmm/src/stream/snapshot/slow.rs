//! A file that is slow or full, for tests: what happens before each block that is put to it.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

/// By whatever thread puts it.
pub type Hook = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// That of the writers that this thread makes.
pub fn hook() -> Option<Hook> {
    HOOK.with_borrow(Clone::clone)
}

/// From now on, in this thread.
pub fn set(hook: Hook) {
    HOOK.set(Some(hook));
}

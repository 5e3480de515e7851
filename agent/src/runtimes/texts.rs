//! The texts of functions, each kept once: processes of one program have the same functions.

use std::{
    collections::{HashMap, hash_map::RandomState},
    hash::BuildHasher as _,
    ops::Deref,
    sync::{
        Arc, LazyLock, Weak,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use super::FunctionText;

/// Bytes of all different texts. A function of usual size takes 300 bytes.
const MAX_BYTES: usize = 16 << 20;
/// Entries for texts that nothing holds any more are removed when the table has grown to this number, or to twice the rest.
const MIN_PRUNED: usize = 1024;

/// The texts of all processes.
static ALL: LazyLock<Texts> = LazyLock::new(|| Texts::new(MAX_BYTES));

/// Returns the bytes of all different texts.
pub(crate) fn text_bytes() -> usize {
    ALL.bytes.load(Ordering::Relaxed)
}

/// Returns the one copy of a text that all processes share. `None`: there is no room for it.
pub(super) fn share(text: FunctionText) -> Option<Arc<SharedText>> {
    ALL.share(text)
}

/// The texts of a function, shared among processes.
#[derive(Debug)]
pub(crate) struct SharedText {
    text: FunctionText,
    /// The sum that they are counted in.
    all: Arc<AtomicUsize>,
}

impl PartialEq for SharedText {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for SharedText {}

impl Deref for SharedText {
    type Target = FunctionText;

    fn deref(&self) -> &FunctionText {
        &self.text
    }
}

impl Drop for SharedText {
    fn drop(&mut self) {
        self.all.fetch_sub(self.text.bytes(), Ordering::Relaxed);
    }
}

struct Texts {
    max: usize,
    bytes: Arc<AtomicUsize>,
    hasher: RandomState,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    by_hash: HashMap<u64, Weak<SharedText>>,
    prune_at: usize,
}

impl Texts {
    fn new(max: usize) -> Self {
        Self { max, bytes: Arc::default(), hasher: RandomState::new(), table: Mutex::default() }
    }

    fn share(&self, text: FunctionText) -> Option<Arc<SharedText>> {
        self.share_by(self.hasher.hash_one(&text), text)
    }

    fn share_by(&self, hash: u64, text: FunctionText) -> Option<Arc<SharedText>> {
        let mut table = self.table.lock();
        let known = table.by_hash.get(&hash).and_then(Weak::upgrade);
        if let Some(known) = &known
            && known.text == text
        {
            return Some(Arc::clone(known));
        }
        let size = text.bytes();
        // Only here bytes are added, under the lock.
        if self.bytes.load(Ordering::Relaxed) + size > self.max {
            return None;
        }
        self.bytes.fetch_add(size, Ordering::Relaxed);
        let shared = Arc::new(SharedText { text, all: Arc::clone(&self.bytes) });
        // Of two different texts with one hash, the first is shared.
        if known.is_none() {
            if table.by_hash.len() >= table.prune_at.max(MIN_PRUNED) {
                table.by_hash.retain(|_, text| text.strong_count() > 0);
                table.prune_at = 2 * table.by_hash.len();
            }
            table.by_hash.insert(hash, Arc::downgrade(&shared));
        }
        Some(shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(name: &str) -> FunctionText {
        FunctionText { name: name.into(), lines: vec![0; 1000], ..FunctionText::default() }
    }

    #[test]
    fn equal_texts_are_kept_once() {
        let size = text("a").bytes();
        let texts = Texts::new(2 * size);
        let copies: Vec<_> = (0..300).map(|_| texts.share(text("a")).unwrap()).collect();
        assert!(copies.iter().all(|copy| Arc::ptr_eq(copy, &copies[0])));
        assert_eq!(texts.bytes.load(Ordering::Relaxed), size);
        let other = texts.share(text("b")).unwrap();
        assert!(!Arc::ptr_eq(&other, &copies[0]) && other.name == "b");
        assert_eq!(texts.share(text("c")), None, "there is room for two");
        drop(copies);
        assert_eq!(texts.bytes.load(Ordering::Relaxed), size);
        assert!(texts.share(text("c")).is_some());
    }

    #[test]
    fn different_texts_of_one_hash_keep_their_names() {
        let texts = Texts::new(MAX_BYTES);
        let shared = ["a", "b", "a"].map(|name| texts.share_by(1, text(name)).unwrap());
        assert_eq!([&*shared[0].name, &*shared[1].name, &*shared[2].name], ["a", "b", "a"]);
        assert!(Arc::ptr_eq(&shared[0], &shared[2]));
    }

    #[test]
    fn texts_that_nothing_holds_leave_the_table() {
        let texts = Texts::new(MAX_BYTES);
        let kept = texts.share(text("kept")).unwrap();
        for number in 0..5 * MIN_PRUNED {
            texts.share(text(&number.to_string())).unwrap();
        }
        assert!(texts.table.lock().by_hash.len() <= MIN_PRUNED);
        assert_eq!(texts.bytes.load(Ordering::Relaxed), kept.bytes());
        assert!(Arc::ptr_eq(&texts.share(text("kept")).unwrap(), &kept));
    }
}

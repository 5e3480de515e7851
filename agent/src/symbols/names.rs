//! Names of functions as they are shared between addresses and cached.

use std::{collections::HashMap, sync::Arc};

use gannet_elf::ContentId;
use gannet_symbols::demangle;
use quick_cache::Weighter;

use crate::model::FileId;

/// Bytes of an entry in the cache, without its functions.
const ENTRY_BYTES: u64 = 96;

/// One function at an address.
#[derive(Clone, Debug)]
pub(super) struct Function {
    pub(super) name: Arc<str>,
    /// The name that the compiler gave.
    pub(super) raw: Arc<str>,
    pub(super) file: Arc<str>,
    pub(super) line: u32,
    pub(super) column: u32,
    /// Line at which the function begins; 0 if unknown.
    pub(super) start_line: u32,
}

/// The functions at one address: the innermost inlined one first.
pub(super) type Functions = Arc<[Function]>;

/// The identity of a file's content in the cache: containers bring files of their own with the same content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ContentKey {
    Content(ContentId),
    /// The content of this file cannot be identified.
    File(FileId),
}

/// Weighs entries of the cache in bytes. A name that several addresses share counts for each of them.
#[derive(Clone)]
pub(super) struct ByBytes;

impl Weighter<(ContentKey, u64), Functions> for ByBytes {
    fn weight(&self, _: &(ContentKey, u64), functions: &Functions) -> u64 {
        let text = |function: &Function| function.name.len() + function.raw.len() + function.file.len();
        let bytes = |function: &Function| (size_of::<Function>() + text(function)) as u64;
        ENTRY_BYTES + functions.iter().map(bytes).sum::<u64>()
    }
}

/// Texts that many addresses share, each stored once.
#[derive(Default)]
pub(super) struct SharedTexts {
    names: HashMap<String, (Arc<str>, Arc<str>)>,
    texts: HashMap<String, Arc<str>>,
}

impl SharedTexts {
    /// Returns the readable form of a compiler's name, and that name.
    pub(super) fn name(&mut self, raw: &str) -> (Arc<str>, Arc<str>) {
        if let Some((name, raw)) = self.names.get(raw) {
            return (Arc::clone(name), Arc::clone(raw));
        }
        let readable = demangle::demangle(raw);
        let shared: Arc<str> = demangle::cut(raw).into();
        let name = if *readable == *shared { Arc::clone(&shared) } else { readable.into() };
        self.names.insert(raw.to_owned(), (Arc::clone(&name), Arc::clone(&shared)));
        (name, shared)
    }

    /// Returns a text.
    pub(super) fn text(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.texts.get(text) {
            return Arc::clone(known);
        }
        let shared: Arc<str> = demangle::cut(text).into();
        self.texts.insert(text.to_owned(), Arc::clone(&shared));
        shared
    }

    /// Returns a function that has a plain name and no line.
    pub(super) fn plain(&mut self, name: &str, file: &str) -> Functions {
        let name = self.text(name);
        [Function { raw: Arc::clone(&name), name, file: self.text(file), line: 0, column: 0, start_line: 0 }]
            .into()
    }

    /// Returns a function of a symbol table: it has no line.
    pub(super) fn symbol(&mut self, raw: &[u8]) -> Functions {
        let (name, raw) = self.name(&String::from_utf8_lossy(raw));
        [Function { name, raw, file: self.text(""), line: 0, column: 0, start_line: 0 }].into()
    }
}

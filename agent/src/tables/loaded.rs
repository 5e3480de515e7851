//! The processes whose mappings are in the kernel.

use std::collections::{BTreeMap, HashMap};

use super::LoadError;
use crate::{
    kernel::{Block, KernelImage, KernelMapping, UnwindMaps, blocks},
    model::ImageKey,
};

/// Keys that the mapping trie may hold: a little less than the kernel allows, so that the kernel never has to refuse one.
const MAX_KEYS: usize = 262_144 - 1024;

/// The processes whose mappings are in the kernel, by thread group id.
#[derive(Default)]
pub(super) struct LoadedImages {
    images: HashMap<u32, LoadedImage>,
    /// Keys in the mapping trie.
    keys: usize,
    /// Counts the changes of images in the kernel: the kernel side forgets everything that it learned in an earlier epoch.
    epoch: u64,
}

struct LoadedImage {
    key: ImageKey,
    mappings: Vec<KernelMapping>,
}

impl LoadedImages {
    pub(super) fn contains(&self, key: &ImageKey) -> bool {
        self.images.get(&key.process.tgid).is_some_and(|image| image.key == *key)
    }

    /// Writes the mappings of a process, or the difference to those that are in the kernel.
    pub(super) fn load(
        &mut self,
        kernel: &mut impl UnwindMaps,
        key: ImageKey,
        mappings: Vec<KernelMapping>,
    ) -> Result<(), LoadError> {
        let tgid = key.process.tgid;
        let new_keys = trie_keys(&mappings)?;
        let old = self.images.get(&tgid);
        let is_new_image = old.is_none_or(|old| old.key != key);
        if !is_new_image && old.is_some_and(|old| old.mappings == mappings) {
            return Ok(());
        }
        let old_keys = old.map_or_else(BTreeMap::new, |old| trie_keys(&old.mappings).unwrap_or_default());
        let total = self.keys - old_keys.len() + new_keys.len();
        if total > MAX_KEYS {
            return Err(LoadError::Keys {
                begin: mappings.first().map_or(0, |mapping| mapping.begin),
                end: mappings.last().map_or(0, |mapping| mapping.end),
                new: new_keys.len(),
                used: self.keys - old_keys.len(),
                capacity: MAX_KEYS,
            });
        }
        if old.is_some() && is_new_image {
            // The mappings of the former image mean nothing now: samples come raw until all are written.
            kernel.remove_image(tgid);
        }
        // New keys overwrite equal old ones in place, then the other old ones go: no look-up misses meanwhile.
        self.images.insert(tgid, LoadedImage { key, mappings });
        self.keys = total;
        let set = new_keys
            .iter()
            .filter(|(block, mapping)| old_keys.get(block) != Some(mapping))
            .try_for_each(|(block, mapping)| {
                let failed = |source| LoadError::Write { begin: mapping.begin, end: mapping.end, source };
                kernel.set_mapping(tgid, *block, mapping).map_err(failed)
            });
        for block in old_keys.keys().filter(|block| !new_keys.contains_key(block)) {
            kernel.remove_mapping(tgid, *block);
        }
        set?;
        self.epoch += 1;
        kernel.set_image(key.process, KernelImage { exec_id: key.exec_id, epoch: self.epoch })?;
        Ok(())
    }

    /// Removes the mappings of a process from the kernel.
    pub(super) fn unload(&mut self, kernel: &mut impl UnwindMaps, tgid: u32) {
        let Some(image) = self.images.remove(&tgid) else { return };
        kernel.remove_image(tgid);
        for mapping in &image.mappings {
            for block in blocks(mapping.begin, mapping.end).unwrap_or_default() {
                kernel.remove_mapping(tgid, block);
                self.keys = self.keys.saturating_sub(1);
            }
        }
    }

    /// Returns the processes that use a table.
    pub(super) fn users_of(&self, table: u32) -> Vec<u32> {
        let uses = |mapping: &KernelMapping| mapping.table.is_some_and(|(number, _)| number == table);
        self.images
            .iter()
            .filter(|(_, image)| image.mappings.iter().any(uses))
            .map(|(tgid, _)| *tgid)
            .collect()
    }

    /// Returns the thread group ids of all processes.
    pub(super) fn all(&self) -> Vec<u32> {
        self.images.keys().copied().collect()
    }

    pub(super) fn processes(&self) -> usize {
        self.images.len()
    }

    pub(super) fn keys(&self) -> usize {
        self.keys
    }
}

/// Returns the keys of the trie for the mappings of one process, and their values.
fn trie_keys(mappings: &[KernelMapping]) -> Result<BTreeMap<Block, KernelMapping>, LoadError> {
    let mut keys = BTreeMap::new();
    for mapping in mappings {
        keys.extend(blocks(mapping.begin, mapping.end)?.into_iter().map(|block| (block, *mapping)));
    }
    Ok(keys)
}

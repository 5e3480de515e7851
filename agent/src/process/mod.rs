//! Who is who: the identity of processes and what is mapped into them.

mod image;
mod key;

pub use image::{Image, Mapping, MappingKind};
pub use key::{ParseKeyError, ProcessKey};

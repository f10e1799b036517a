//! What the project is held to: tidiness of the source, conformance of every answer to OpenStack's
//! own, and the harness that runs the real programs.
//!
//! Owns no behaviour of the product; must never be a dependency of a program.

pub mod harness;
pub mod tidy;

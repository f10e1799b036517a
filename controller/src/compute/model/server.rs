//! What a server is made of, beside its row's columns.

use fractus_agent_api::guest::GuestOptions;
use fractus_agent_api::machine::{Boot, ImageRef, RootDisk};
use serde::{Deserialize, Serialize};

/// What the machine boots and from which image its disk is made, resolved when the server was
/// created or rebuilt: later changes of the image do not reach a server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BootPlan {
    /// None: from the root disk.
    #[serde(default)]
    pub kernel: Option<ImageRef>,
    #[serde(default)]
    pub initrd: Option<ImageRef>,
    #[serde(default)]
    pub command_line: String,
    /// None: a machine without a disk (its image is the kernel itself).
    #[serde(default)]
    pub root_disk: Option<RootDisk>,
    /// How its guest is treated, as image and flavor say; without instance data, which changes.
    #[serde(default)]
    pub guest: GuestOptions,
}

impl BootPlan {
    pub fn boot(&self) -> Boot {
        Boot {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            command_line: self.command_line.clone(),
        }
    }

    /// Every image that the machine's host must be able to fetch.
    pub fn images(&self) -> impl Iterator<Item = &ImageRef> {
        let disk = self.root_disk.as_ref().and_then(|disk| disk.image.as_ref());
        [self.kernel.as_ref(), self.initrd.as_ref(), disk]
            .into_iter()
            .flatten()
    }
}

//! KVM's log of what the guest writes to, and the right to read it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;

use super::{KvmError, Vm, give_memory, refused};
use crate::memory::PageSet;

/// The log of a VM, on for as long as this lives. To read it is to empty it, so there is one of these at a time: who
/// has it takes what nobody else will be told.
pub struct DirtyLog {
    vm: Arc<Vm>,
}

impl DirtyLog {
    /// From here on KVM notes what the guest writes to, and its huge pages are cut up as they are written to. `None`:
    /// somebody reads the log already.
    pub fn begin(vm: &Arc<Vm>) -> Result<Option<DirtyLog>, KvmError> {
        if vm.is_logged.swap(true, Ordering::AcqRel) {
            return Ok(None);
        }
        // What fails here gives the log back, too.
        let log = DirtyLog { vm: Arc::clone(vm) };
        give_memory(&vm.fd, &vm.memory, KVM_MEM_LOG_DIRTY_PAGES)?;
        Ok(Some(log))
    }

    /// Adds what the guest has written to, since the log was begun or last taken, to `pages`.
    pub fn take(&self, pages: &mut PageSet) -> Result<(), KvmError> {
        let memory = &self.vm.memory;
        let slots = memory.slots().into_iter().zip(memory.offsets());
        for (index, (slot, offset)) in slots.enumerate() {
            let log = (self.vm.fd)
                .get_dirty_log(index as u32, slot.size as usize)
                .map_err(refused("tell what the guest wrote to (KVM_GET_DIRTY_LOG)"))?;
            pages.add(offset, &log);
        }
        Ok(())
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        if let Err(error) = give_memory(&self.vm.fd, &self.vm.memory, 0) {
            tracing::warn!(%error, "the guest's writes are logged on, and slower");
        }
        self.vm.is_logged.store(false, Ordering::Release);
    }
}

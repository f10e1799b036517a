//! The registers of CPUID in which each bit is a feature, and what Linux calls the bits (/proc/cpuinfo).
//!
//! A register that is not named here is none: a profile gives nothing of it. Sources: Intel SDM vol. 2 CPUID, AMD APM
//! vol. 3 appendix E, Documentation/virt/kvm/x86/cpuid.rst, names of Linux's cpufeatures.h; `xss_` are components of
//! IA32_XSS, `kvm_` KVM's own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    pub const ALL: [Register; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];

    fn word(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// One register of one leaf; as text `80000001.0.ecx`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Word {
    pub leaf: u32,
    pub index: u32,
    pub register: Register,
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let register = self.register.word();
        write!(f, "{:x}.{:x}.{register}", self.leaf, self.index)
    }
}

impl From<Word> for String {
    fn from(word: Word) -> String {
        word.to_string()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no register of CPUID (80000001.0.ecx is one)")]
pub struct NoWord(String);

impl FromStr for Word {
    type Err = NoWord;

    fn from_str(text: &str) -> Result<Word, NoWord> {
        let parsed = || {
            let (leaf, rest) = text.split_once('.')?;
            let (index, register) = rest.split_once('.')?;
            Some(Word {
                leaf: u32::from_str_radix(leaf, 16).ok()?,
                index: u32::from_str_radix(index, 16).ok()?,
                register: Register::ALL
                    .into_iter()
                    .find(|one| one.word() == register)?,
            })
        };
        parsed().ok_or_else(|| NoWord(text.to_owned()))
    }
}

impl TryFrom<String> for Word {
    type Error = NoWord;

    fn try_from(text: String) -> Result<Word, NoWord> {
        text.parse()
    }
}

pub(crate) const fn word(leaf: u32, index: u32, register: Register) -> Word {
    Word {
        leaf,
        index,
        register,
    }
}

pub(crate) const LEAF1_ECX: Word = word(1, 0, Register::Ecx);
pub(crate) const LEAF1_EDX: Word = word(1, 0, Register::Edx);
pub(crate) const LEAF7_EBX: Word = word(7, 0, Register::Ebx);
pub const LEAF7_ECX: Word = word(7, 0, Register::Ecx);
pub(crate) const LEAF7_EDX: Word = word(7, 0, Register::Edx);
pub(crate) const XSAVE_FORMS: Word = word(0xd, 1, Register::Eax);
/// Components of IA32_XSS, the low half.
pub const XSS: Word = word(0xd, 1, Register::Ecx);
pub(crate) const EXTENDED_ECX: Word = word(0x8000_0001, 0, Register::Ecx);
pub(crate) const EXTENDED_EDX: Word = word(0x8000_0001, 0, Register::Edx);

/// Names from bit 0 on; `-` has none.
pub(crate) const WORDS: [(Word, &str); 19] = [
    (
        LEAF1_ECX,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 \
         sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    ),
    (
        LEAF1_EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse \
         sse2 ss ht tm ia64 pbe",
    ),
    (word(6, 0, Register::Eax), "- - arat"),
    (
        LEAF7_EBX,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a \
         avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni \
         avx512bw avx512vl",
    ),
    (
        LEAF7_ECX,
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
         avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri movdir64b \
         enqcmd sgx_lc pks",
    ),
    (
        LEAF7_EDX,
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - \
         tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 \
         spec_ctrl intel_stibp flush_l1d arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    (
        word(7, 1, Register::Eax),
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs \
         wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist - - - movrs",
    ),
    (word(7, 1, Register::Ecx), "- - - - - msr_imm"),
    (
        word(7, 1, Register::Edx),
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchiti - - - cet_sss avx10 - \
         apx_f",
    ),
    (
        word(7, 2, Register::Edx),
        "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    ),
    (XSAVE_FORMS, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        XSS,
        "- - - - - - - - xss_pt - xss_pasid xss_cet_u xss_cet_s xss_hdc xss_uintr xss_lbr xss_hwp",
    ),
    (
        word(0x4000_0001, 0, Register::Eax),
        "kvm_clock kvm_nop_io_delay kvm_mmu_op kvm_clock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
         kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int \
         kvm_msi_ext_dest_id kvm_map_gpa_range kvm_migration_control - - - - - - kvm_clock_stable",
    ),
    (
        EXTENDED_ECX,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp \
         fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    ),
    // The bits that AMD has here once more are those of leaf 1.
    (
        EXTENDED_EDX,
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx - mmxext mmx fxsr \
         fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow",
    ),
    (
        word(0x8000_0007, 0, Register::Edx),
        "- - - - - - - - constant_tsc",
    ),
    (
        word(0x8000_0008, 0, Register::Ebx),
        "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp - amd_stibp_always_on - - - \
         - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret brs",
    ),
    (
        word(0x8000_0021, 0, Register::Eax),
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc - - verw_clear null_sel_clr_base - autoibrs no_smm_ctl_msr - - - \
         - - - - - - - prefetchi - - - - - - sbpb ibpb_brtype srso_no srso_user_kernel_no srso_bp_spec_reduce",
    ),
    (word(0x8000_0021, 0, Register::Ecx), "- tsa_sq_no tsa_l1_no"),
];

/// Features are in this register.
pub fn is_named(word: Word) -> bool {
    WORDS.iter().any(|(known, _)| *known == word)
}

/// Bits that are no feature of the host's: what the guest switches on (OSXSAVE, OSPKE, APIC), where the vCPU is in its
/// machine (HT, CMP_LEGACY), what each machine has (x2APIC, hypervisor) and what none has (VMX, SVM, MONITOR).
pub fn ignored(word: Word) -> u32 {
    match word {
        LEAF1_ECX => 1 << 3 | 1 << 5 | 1 << 21 | 1 << 27 | 1 << 31,
        LEAF1_EDX => 1 << 9 | 1 << 28,
        LEAF7_ECX => 1 << 4,
        EXTENDED_ECX => 1 << 1 | 1 << 2,
        EXTENDED_EDX => 1 << 9,
        _ => 0,
    }
}

/// Where the feature of this name is.
pub fn by_name(feature: &str) -> Option<(Word, u32)> {
    WORDS.iter().find_map(|(word, names)| {
        let mut names = names.split_ascii_whitespace().filter(|_| feature != "-");
        Some((*word, names.position(|name| name == feature)? as u32))
    })
}

/// What Linux calls a bit; where it has no name, its place.
pub fn name(word: Word, bit: u32) -> String {
    let known = WORDS.iter().find(|(known, _)| *known == word);
    let known = known.and_then(|(_, names)| names.split_ascii_whitespace().nth(bit as usize));
    match known.filter(|name| *name != "-") {
        Some(name) => name.to_owned(),
        None => format!("cpuid_{word}_{bit}"),
    }
}

# Ring 0 of the probe: all of it. Under a KVM that emulates ring 0 (about 1 MIPS, no SSE) every
# instruction here is dear, so tables are assembled, not computed, and the first thing done is to
# leave for ring 3. Afterwards ring 0 is entered for three things only: the gate (`ud2`), interrupts
# (count, end-of-interrupt, back) and faults (back to ring 3 with the registers that tell).
#
# Addresses are fixed (link.ld puts this section at 1 MiB), because the fields of gates and
# descriptors hold addresses in pieces, which no relocation can fill.

.set BASE,       0x100000
.set IDT,        0x1000          # 256 gates
.set GDT,        0x2000          # 5 segments, a TSS for each CPU, 32-bit code
.set STUBS,      0x3000          # 16 bytes for each vector
.set CODE,       0x4000
.set PML4,       0x5000
.set PDPT,       0x6000
.set PD,         0x7000          # four of them: the first 4 GiB, in pages of 2 MiB
.set TSS,        0xb000          # 128 bytes for each CPU
.set END,        0xd000

.set CPUS,       64
.set CPU_BLOCK,  0x10000         # see cpu.rs: counters, ring-0 stack, ring-3 stack
.set CPU_EVENTS, 0x800
.set CPU_RING0,  0x2000
.set CODE32,     0x28 + 16 * CPUS

.section .note.pvh, "a", @note
  .balign 4
  .long 4, 8, 18                 # XEN_ELFNOTE_PHYS32_ENTRY
  .asciz "Xen"
  .quad pvh_entry

.section .boot, "awx", @progbits

# --- Boot processor: 32-bit protected mode, no paging, ebx = start info (PVH).
.code32
.globl pvh_entry
pvh_entry:
  cli
  cld
  lgdt gdtr
  mov $ap_stack_end, %esp
  call long_mode_on
  ljmp $0x08, $long_bsp

# Paging with 4 levels, and what SSE in ring 3 needs. Spoils eax, ecx, edx.
long_mode_on:
  mov $0x620, %eax               # PAE, OSFXSR, OSXMMEXCPT
  mov %eax, %cr4
  mov $(BASE + PML4), %eax
  mov %eax, %cr3
  mov $0xc0000080, %ecx          # EFER: LME
  mov $0x100, %eax
  xor %edx, %edx
  wrmsr
  mov $0x80000033, %eax          # PG, NE, ET, MP, PE
  mov %eax, %cr0
  ret

ap_protected:
  mov $0x10, %ax
  mov %ax, %ds
  mov %ax, %ss
  mov $ap_stack_end, %esp        # shared: every processor pushes and pops the same return address
  call long_mode_on
  ljmp $0x08, $long_ap

.code64
long_bsp:
  mov %ebx, %edi
  xor %esi, %esi
  mov $probe_main, %r8d
  jmp enter_ring3

long_ap:
  mov $1, %eax
  cpuid
  shr $24, %ebx                  # initial APIC id
  movzbl cpu_of_apic(%rbx), %esi
  mov %esi, %edi
  mov $probe_ap, %r8d

# esi = CPU number, rdi = argument, r8 = function of ring 3 that never returns.
enter_ring3:
  lidt idtr
  mov %esi, %eax
  shl $4, %eax
  add $0x28, %eax
  ltr %ax
  mov $0x23, %eax
  mov %eax, %ds
  mov %eax, %es
  mov %eax, %fs
  mov %eax, %gs
  imul $CPU_BLOCK, %esi, %ebx
  add $cpu_blocks, %ebx
  mov $0xc0000101, %ecx          # GS base: this CPU's block
  mov %ebx, %eax
  xor %edx, %edx
  wrmsr
  lea CPU_RING0(%rbx), %rsp
  add $(CPU_BLOCK - 8), %ebx
  pushq $0x23
  push %rbx
  pushq $2
  pushq $0x1b
  push %r8
  iretq

# --- Other processors start in real mode, from a copy of this in low memory.
.code16
.globl ap_start, ap_end
ap_start:
  cli
  lgdtl %cs:(ap_gdtr - ap_start)
  mov $0x11, %eax
  mov %eax, %cr0
  ljmpl $CODE32, $ap_protected
.balign 4
ap_gdtr:
  .word CODE32 + 7
  .long BASE + GDT
ap_end:

.balign 16
  .fill 32, 1, 0
ap_stack_end:

.globl cpu_of_apic
cpu_of_apic: .fill 256, 1, 0

gdtr:
  .word CODE32 + 7
  .quad BASE + GDT
idtr:
  .word 4095
  .quad BASE + IDT
no_idt:
  .word 0
  .quad 0

# --- Interrupt descriptor table: vector v goes to its stub.
.org IDT
.set v, 0
.rept 256
  .word STUBS + 16 * v, 0x08
  .byte 0, 0x8e
  .word BASE >> 16
  .quad 0
  .set v, v + 1
.endr

.org GDT
  .quad 0
  .quad 0x00af9b000000ffff       # 08 ring-0 code
  .quad 0x00cf93000000ffff       # 10 ring-0 data
  .quad 0x00affb000000ffff       # 18 ring-3 code
  .quad 0x00cff3000000ffff       # 20 ring-3 data
.set v, 0
.rept CPUS                       # 28 and on: available 64-bit TSS, one each
  .word 103, (TSS + 128 * v) & 0xffff
  .byte BASE >> 16, 0x89, 0, 0
  .quad 0
  .set v, v + 1
.endr
  .quad 0x00cf9b000000ffff       # 32-bit ring-0 code, for starting processors

.org STUBS
.code64
.set v, 0
.rept 256
  .org STUBS + 16 * v
  .if v == 6
    jmp gate
  .elseif v < 32
    .if (v == 8) || (v == 10) || (v == 11) || (v == 12) || (v == 13) || (v == 14) || (v == 17) || (v == 21)
    .else
      pushq $0
    .endif
    pushq $v
    jmp fault
  .elseif v == 255               # spurious: no end-of-interrupt
    iretq
  .else
    incq %gs:(8 * v)
    jmp interrupt
  .endif
  .set v, v + 1
.endr

.org CODE
# Something happened: count it (that is what `hlt` of the gate looks at), end of interrupt.
interrupt:
  incq %gs:CPU_EVENTS
  push %rax
  push %rcx
  push %rdx
  mov $0x80b, %ecx
  xor %eax, %eax
  xor %edx, %edx
  wrmsr
  pop %rdx
  pop %rcx
  pop %rax
  iretq

# `ud2` in ring 3: rdi says what is wanted; the other registers as the instruction wants them.
gate:
  cmp $GATES, %rdi
  jae gate_bad
  addq $2, (%rsp)
  jmp *gates(,%rdi,8)
gate_bad:
  pushq $0
  pushq $6
  jmp fault

.balign 8
gates:
  .quad gate_outb, gate_outw, gate_outl, gate_inb, gate_inw, gate_inl, gate_outs
  .quad gate_wrmsr, gate_rdmsr, gate_cpuid, gate_hlt, gate_irq_on, gate_flush, gate_triple, gate_rdtsc
.set GATES, (. - gates) / 8
gate_outb:
  out %al, %dx
  iretq
gate_outw:
  out %ax, %dx
  iretq
gate_outl:
  out %eax, %dx
  iretq
gate_inb:
  in %dx, %al
  iretq
gate_inw:
  in %dx, %ax
  iretq
gate_inl:
  in %dx, %eax
  iretq
gate_outs:
  rep outsb
  iretq
gate_wrmsr:
  wrmsr
  iretq
gate_rdmsr:
  rdmsr
  iretq
gate_cpuid:
  mov %rbx, %r8
  cpuid
  xchg %rbx, %r8
  iretq
# Sleeps unless something happened since ring 3 last looked (r8: the count it saw): no lost wake-up.
gate_hlt:
  cmp %r8, %gs:CPU_EVENTS
  jne 1f
  sti
  hlt
  cli
1:
  iretq
gate_irq_on:
  orq $0x200, 16(%rsp)
  iretq
gate_flush:
  mov %cr3, %rax
  mov %rax, %cr3
  iretq
gate_triple:
  lidt no_idt
  ud2
gate_rdtsc:
  rdtsc
  iretq

# A fault of ring 3: on with `probe_fault` (vector, error, rip, cr2, rsp) there. Stack now: vector,
# error, then the frame.
fault:
  testb $3, 24(%rsp)
  jz fault_ring0
  pop %rdi
  pop %rsi
  mov (%rsp), %rdx
  mov %cr2, %rcx
  mov 24(%rsp), %r8
  andq $-16, 24(%rsp)
  subq $8, 24(%rsp)
  movq $probe_fault, (%rsp)
  iretq
fault_ring0:
  mov $0x3f8, %edx
  mov $'!', %eax
  out %al, %dx
1:
  cli
  hlt
  jmp 1b

# --- Page tables: user, writable, present; the first 4 GiB as they are. More by memory.rs.
.org PML4
  .quad BASE + PDPT + 7
  .fill 511, 8, 0
.org PDPT
  .quad BASE + PD + 0x0007, BASE + PD + 0x1007, BASE + PD + 0x2007, BASE + PD + 0x3007
  .fill 508, 8, 0
.org PD
.set v, 0
.rept 2048
  .quad (v << 21) + 0x87
  .set v, v + 1
.endr

.org TSS
.set v, 0
.rept CPUS
  .long 0
  .quad cpu_blocks + CPU_BLOCK * v + CPU_RING0
  .fill 90, 1, 0
  .word 104
  .fill 24, 1, 0
  .set v, v + 1
.endr
.org END

.bss
.balign 4096
.globl cpu_blocks
cpu_blocks: .fill CPUS * CPU_BLOCK, 1, 0

# What compiled Rust expects of a C library. Ring 3 runs natively: string instructions are fast.
.section .text.memory, "ax", @progbits
.globl memcpy, memmove, memset, memcmp, bcmp, strlen
memcpy:
  mov %rdi, %rax
  mov %rdx, %rcx
  rep movsb
  ret
memmove:
  mov %rdi, %rax
  mov %rdx, %rcx
  mov %rdi, %r8
  sub %rsi, %r8
  cmp %rdx, %r8
  jb 1f
  rep movsb
  ret
1:
  lea -1(%rdi,%rdx), %rdi
  lea -1(%rsi,%rdx), %rsi
  std
  rep movsb
  cld
  ret
memset:
  mov %rdi, %r8
  mov %esi, %eax
  mov %rdx, %rcx
  rep stosb
  mov %r8, %rax
  ret
memcmp:
bcmp:
  xor %ecx, %ecx
1:
  cmp %rdx, %rcx
  je 2f
  movzbl (%rdi,%rcx), %eax
  movzbl (%rsi,%rcx), %r8d
  inc %rcx
  sub %r8d, %eax
  je 1b
  ret
2:
  xor %eax, %eax
  ret
strlen:
  xor %eax, %eax
1:
  cmpb $0, (%rdi,%rax)
  je 2f
  inc %rax
  jmp 1b
2:
  ret

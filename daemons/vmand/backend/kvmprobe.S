# The guest by which vmand finds out whether KVM runs kernels on this host (see kvm.py).
#
# A 64 KiB BIOS image, linked at 0xF0000. It does what a kernel does first, in some milliseconds on a sound host, and
# writes one letter to port 0xE9 after each step that went well, so that the missing letter names the one that did not:
#   R real mode   P protected mode   L long mode with paging   H code in the high half
#   S speed: 16 million turns of a loop, which emulated code can't do in time   T a timer interrupt wakes HLT
#   U user mode, and back by an interrupt
# then leaves through isa-debug-exit (port 0xF4) with the value 0x10: QEMU's exit status is 33.
#
# Assemble: as --64 -o kvmprobe.o kvmprobe.S && ld -Ttext=0xF0000 --oformat binary -o kvmprobe.bin kvmprobe.o
# The bytes are in kvmprobe.py; a unit test assembles this file anew and compares.

        .set HIGH,  0xffffffff80000000
        .set PML4,  0x10000            # page tables in RAM
        .set PDPT,  0x11000
        .set PD,    0x12000            # four of them: 4 GiB in pages of 2 MiB
        .set PDPTH, 0x16000            # the high half: the first GiB again
        .set IDT,   0x17000
        .set GDT,   0x18000
        .set TSS,   0x19000
        .set FLAG,  0x1a000
        .set APIC,  0xfee00000

        .macro say letter
        movb    $\letter, %al
        outb    %al, $0xe9
        .endm

        .text
        .code16
        .globl  _start
_start: cli
        say     'R'
        xorw    %ax, %ax
        movw    %ax, %ds
        lgdtl   %cs:(gdt_ptr - 0xF0000)
        movl    %cr0, %eax
        orb     $1, %al
        movl    %eax, %cr0
        ljmpl   $0x08, $protected

        .code32
protected:
        movw    $0x10, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x80000, %esp
        say     'P'
        cld
        movl    $PML4, %edi            # clear tables, IDT, GDT, TSS, flag
        xorl    %eax, %eax
        movl    $(0xb000 / 4), %ecx
        rep stosl
        movl    $gdt, %esi             # the GDT in RAM: the CPU writes its busy and accessed bits
        movl    $GDT, %edi
        movl    $((gdt_end - gdt) / 4), %ecx
        rep movsl
        lgdtl   gdt_ram_ptr
        movl    $PD, %edi
        movl    $0x87, %eax            # present, writable, user, 2 MiB
        movl    $2048, %ecx
1:      movl    %eax, (%edi)
        addl    $0x200000, %eax
        addl    $8, %edi
        loop    1b
        movl    $(PD + 0x0007), PDPT
        movl    $(PD + 0x1007), PDPT + 8
        movl    $(PD + 0x2007), PDPT + 16
        movl    $(PD + 0x3007), PDPT + 24
        movl    $(PD + 0x0007), PDPTH + 510 * 8
        movl    $(PDPT + 7), PML4
        movl    $(PDPTH + 7), PML4 + 511 * 8
        movl    %cr4, %eax
        orl     $0x20, %eax            # PAE
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx      # EFER.LME
        rdmsr
        orl     $0x100, %eax
        wrmsr
        movl    %cr0, %eax
        orl     $0x80000000, %eax
        movl    %eax, %cr0
        ljmpl   $0x18, $long

        .code64
long:   say     'L'
        movabsq $(HIGH + high), %rax
        jmpq    *%rax
high:   say     'H'
        movw    $0x10, %ax
        movw    %ax, %ss
        movabsq $(HIGH + 0x80000), %rsp
        movl    $IDT + 0x20 * 16, %edi # vector 0x20: the timer
        movl    $(timer - 0xF0000), %eax
        movl    $0x8e00, %ecx
        call    gate
        movl    $IDT + 0x21 * 16, %edi # vector 0x21: from user mode
        movl    $(back - 0xF0000), %eax
        movl    $0xee00, %ecx
        call    gate
        lidt    idt_ptr
        movabsq $(HIGH + 0x78000), %rax
        movq    %rax, TSS + 4          # RSP0
        movw    $0x30, %ax
        ltr     %ax
        movl    $0x1000000, %ecx
5:      decl    %ecx
        jnz     5b
        say     'S'
        movl    $APIC, %ebx
        movl    $0x1ff, 0xf0(%rbx)     # the local APIC on, its timer once, soon
        movl    $0x0b, 0x3e0(%rbx)
        movl    $0x20, 0x320(%rbx)
        movl    $0x20000, 0x380(%rbx)
2:      cli
        cmpb    $0, FLAG
        jne     3f
        sti
        hlt
        jmp     2b
3:      pushq   $0x2b                  # to user mode
        pushq   $0x70000
        pushq   $0x02
        pushq   $0x23
        pushq   $user
        iretq
user:   int     $0x21
        jmp     user

timer:  pushq   %rax
        say     'T'
        movb    $1, FLAG
        movl    $0, 0xb0(%rbx)
        popq    %rax
        iretq

back:   say     'U'
        movb    $0x10, %al
        movw    $0xf4, %dx
        outb    %al, %dx
4:      hlt
        jmp     4b

# edi: the gate, eax: the handler's offset in 0xF0000, ecx: type << 8. The handler runs in the high half.
gate:   movw    %ax, (%rdi)
        movw    $0x18, 2(%rdi)
        movw    %cx, 4(%rdi)
        movw    $0x800f, 6(%rdi)       # HIGH + 0xF0000
        movl    $0xffffffff, 8(%rdi)
        movl    $0, 12(%rdi)
        ret

        .balign 8, 0
gdt:    .quad   0
        .quad   0x00cf9b000000ffff     # 08 code, 32 bits
        .quad   0x00cf93000000ffff     # 10 data
        .quad   0x00af9b000000ffff     # 18 code, 64 bits
        .quad   0x00affb000000ffff     # 20 code, 64 bits, user
        .quad   0x00cff3000000ffff     # 28 data, user
        .quad   0x0000890190000067     # 30 TSS at 0x19000
        .quad   0
gdt_end:
gdt_ptr:
        .word   gdt_end - gdt - 1
        .long   gdt
gdt_ram_ptr:
        .word   gdt_end - gdt - 1
        .long   GDT
idt_ptr:
        .word   0x22 * 16 - 1
        .quad   IDT

        .org    0xfff0                 # where a CPU begins
        .code16
        ljmpw   $0xf000, $0
        .org    0x10000

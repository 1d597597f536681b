// The guest agent for x86-64: long mode, identity paging, no interrupts. Position-independent; it is one page behind its mailbox, and its
// data buffer 60 KiB further on. Words of the mailbox and the meaning of the commands: lib/agent/protocol.ts. After a change:
//   node scripts/agent.mjs
//
// No string instructions: an emulated one would use the host address of memory that the guest sees elsewhere. Every access is to one aligned
// word or to one byte, so none crosses a page.

#define MAILBOX   start - 0x1000
#define BUFFER    start + 0xf000

#define COMMAND   0x00(%rbp)
#define ADDRESS   0x08(%rbp)
#define SIZE      0x10(%rbp)
#define ARG0      0x18(%rbp)
#define ARG1      0x20(%rbp)
#define ARG2      0x28(%rbp)
#define ARG3      0x30(%rbp)
#define ARG4      0x38(%rbp)
#define RESULT    0x40(%rbp)
#define TABLES    0x48(%rbp)
#define VMMCALL   0x50(%rbp)

#define PORT      0x4d46
#define READY     0
#define ASK       1

        .code64
        .text
start:
        lea     MAILBOX(%rip), %rbp
        mov     $READY, %eax
        mov     $PORT, %edx
        out     %eax, %dx
resume:
        // The host may have changed the page tables.
        mov     TABLES, %rax
        mov     %rax, %cr3
        mov     ADDRESS, %rsi
        mov     SIZE, %r8
        lea     (%rsi, %r8), %r9
        mov     ARG0, %rax
        // The buffer's byte for address: at the same place of its 64 KiB. %rdi is how far that is from the address.
        lea     BUFFER(%rip), %rdi
        movzwl  %si, %ecx
        add     %rcx, %rdi
        sub     %rsi, %rdi
        mov     COMMAND, %rcx
        cmp     $1, %rcx
        je      read
        cmp     $2, %rcx
        je      write
        cmp     $3, %rcx
        je      fill
        cmp     $4, %rcx
        je      checksum
        cmp     $5, %rcx
        je      compare_and_swap
        cmp     $6, %rcx
        je      touch
        cmp     $7, %rcx
        je      hypercall
        cmp     $8, %rcx
        je      halt
        cmp     $9, %rcx
        je      ask
        jmp     start

// From %rsi to %r9: bytes up to the first whole word, words, bytes.
.macro walk
1:      cmp     %r9, %rsi
        jae     done
        test    $7, %sil
        jz      2f
        one
        inc     %rsi
        jmp     1b
2:      mov     %r9, %r10
        and     $-8, %r10
        cmp     %r10, %rsi
        jae     4f
3:      word
        add     $8, %rsi
        cmp     %r10, %rsi
        jb      3b
4:      cmp     %r9, %rsi
        jae     done
        one
        inc     %rsi
        jmp     4b
.endm

.macro word
        mov     (%rsi), %rax
        mov     %rax, (%rsi, %rdi)
.endm
.macro one
        mov     (%rsi), %al
        mov     %al, (%rsi, %rdi)
.endm
read:   walk

.purgem word
.purgem one
.macro word
        mov     (%rsi, %rdi), %rax
        mov     %rax, (%rsi)
.endm
.macro one
        mov     (%rsi, %rdi), %al
        mov     %al, (%rsi)
.endm
write:  walk

.purgem word
.purgem one
.macro word
        mov     %rax, (%rsi)
.endm
.macro one
        mov     %al, (%rsi)
.endm
fill:   walk

checksum:
        test    $7, %sil
        jnz     3f
        mov     %r8, %r10
        and     $-8, %r10
        add     %rsi, %r10
        cmp     %r10, %rsi
        jae     3f
2:      rol     $5, %rax
        add     (%rsi), %rax
        add     $8, %rsi
        cmp     %r10, %rsi
        jb      2b
        // Words that are not aligned, and the last ones, byte by byte.
3:      cmp     %r9, %rsi
        jae     store
        xor     %edx, %edx
        xor     %ecx, %ecx
4:      movzbl  (%rsi), %r11d
        shl     %cl, %r11
        or      %r11, %rdx
        inc     %rsi
        add     $8, %ecx
        cmp     $64, %ecx
        je      5f
        cmp     %r9, %rsi
        jb      4b
5:      rol     $5, %rax
        add     %rdx, %rax
        jmp     3b

compare_and_swap:
        mov     ARG1, %rcx
        lock cmpxchg %rcx, (%rsi)
        jmp     store

// The first byte, then the first of every page behind it. ARG0: bytes of a page; ARG1: whether to write it back.
touch:
        mov     %rax, %rdi
        mov     %rax, %r10
        neg     %r10
        mov     ARG1, %rcx
1:      cmp     %r9, %rsi
        jae     done
        mov     (%rsi), %al
        test    %ecx, %ecx
        jz      2f
        mov     %al, (%rsi)
2:      add     %rdi, %rsi
        and     %r10, %rsi
        jmp     1b

hypercall:
        mov     ARG1, %rbx
        mov     ARG2, %rcx
        mov     ARG3, %rdx
        mov     ARG4, %rsi
        cmpl    $0, VMMCALL
        jne     1f
        vmcall
        jmp     store
1:      vmmcall
store:
        mov     %rax, RESULT
done:
        movq    $0, COMMAND
        jmp     start

halt:
        movq    $0, COMMAND
        hlt
        jmp     start

// The host reads what is asked in the mailbox, and leaves its answer there.
ask:
        mov     $ASK, %eax
        mov     $PORT, %edx
        out     %eax, %dx
        jmp     done

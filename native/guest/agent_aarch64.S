// The guest agent for arm64: EL1, MMU on, identity mapping, no interrupts. Position-independent; it is one page behind its mailbox, and its
// data buffer 60 KiB further on. Words of the mailbox and the meaning of the commands: lib/agent/protocol.ts. After a change:
//   node scripts/agent.mjs
//
// Every access is to one aligned word or to one byte, so none crosses a page, and none updates its address register: the hypervisor could not
// tell what an MMIO access of that kind was.

#define COMMAND   0x00
#define ADDRESS   0x08
#define SIZE      0x10
#define ARG0      0x18
#define ARG1      0x20
#define ARG2      0x28
#define ARG3      0x30
#define ARG4      0x38
#define RESULT    0x40
#define TABLES    0x48
#define DOORBELL  0x58
#define SHARE     0x60

#define READY     0
#define ASK       1
#define EXCEPTION 2

#define PSCI_SYSTEM_OFF 0x84000008
// pKVM's: x1 is the address of a page.
#define MEM_SHARE       0xc6000003

        .text
start:
        adr     x19, start
        sub     x19, x19, #0x1000
        ldr     x20, [x19, #SHARE]
        cbnz    x20, share
ready:
        mov     w0, #READY
ring:
        adr     x19, start
        sub     x19, x19, #0x1000
        ldr     x1, [x19, #DOORBELL]
        str     w0, [x1]
resume:
        // The host may have changed the page tables.
        ldr     x0, [x19, #TABLES]
        msr     ttbr0_el1, x0
        isb
        tlbi    vmalle1
        dsb     nsh
        isb
        ldr     x2, [x19, #ADDRESS]
        ldr     x3, [x19, #SIZE]
        add     x4, x2, x3
        ldr     x5, [x19, #ARG0]
        // The buffer's byte for address: at the same place of its 64 KiB. x6 is how far that is from the address.
        add     x6, x19, #0x10, lsl #12
        and     x7, x2, #0xffff
        add     x6, x6, x7
        sub     x6, x6, x2
        ldr     x0, [x19, #COMMAND]
        cmp     x0, #1
        b.eq    read
        cmp     x0, #2
        b.eq    write
        cmp     x0, #3
        b.eq    fill
        cmp     x0, #4
        b.eq    checksum
        cmp     x0, #5
        b.eq    compare_and_swap
        cmp     x0, #6
        b.eq    touch
        cmp     x0, #7
        b.eq    hypercall
        cmp     x0, #8
        b.eq    halt
        cmp     x0, #9
        b.eq    ask
        b       ready

// From x2 to x4: bytes up to the first whole word, words, bytes.
.macro walk
1:      cmp     x2, x4
        b.hs    done
        tst     x2, #7
        b.eq    2f
        one
        add     x2, x2, #1
        b       1b
2:      and     x8, x4, #-8
        cmp     x2, x8
        b.hs    4f
3:      word
        add     x2, x2, #8
        cmp     x2, x8
        b.lo    3b
4:      cmp     x2, x4
        b.hs    done
        one
        add     x2, x2, #1
        b       4b
.endm

.macro word
        ldr     x9, [x2]
        str     x9, [x2, x6]
.endm
.macro one
        ldrb    w9, [x2]
        strb    w9, [x2, x6]
.endm
read:   walk

.purgem word
.purgem one
.macro word
        ldr     x9, [x2, x6]
        str     x9, [x2]
.endm
.macro one
        ldrb    w9, [x2, x6]
        strb    w9, [x2]
.endm
write:  walk

.purgem word
.purgem one
.macro word
        str     x5, [x2]
.endm
.macro one
        strb    w5, [x2]
.endm
fill:   walk

compare_and_swap:
        ldr     x7, [x19, #ARG1]
1:      ldaxr   x9, [x2]
        cmp     x9, x5
        b.ne    2f
        stlxr   w8, x7, [x2]
        cbnz    w8, 1b
        b       3f
2:      clrex
3:      mov     x5, x9
        b       store

        // The one vector that can be taken: a synchronous exception of EL1 with its own stack pointer. VBAR_EL1 is start.
        .org    0x200
vector:
        adr     x19, start
        sub     x19, x19, #0x1000
        mrs     x0, esr_el1
        str     x0, [x19, #RESULT]
        mrs     x0, far_el1
        str     x0, [x19, #ARG0]
        str     xzr, [x19, #COMMAND]
        mov     w0, #EXCEPTION
        b       ring

checksum:
        tst     x2, #7
        b.ne    3f
        and     x8, x3, #-8
        add     x8, x8, x2
        cmp     x2, x8
        b.hs    3f
2:      ldr     x9, [x2]
        ror     x5, x5, #59
        add     x5, x5, x9
        add     x2, x2, #8
        cmp     x2, x8
        b.lo    2b
        // Words that are not aligned, and the last ones, byte by byte.
3:      cmp     x2, x4
        b.hs    store
        mov     x9, #0
        mov     x10, #0
4:      ldrb    w11, [x2]
        lsl     x11, x11, x10
        orr     x9, x9, x11
        add     x2, x2, #1
        add     x10, x10, #8
        cmp     x10, #64
        b.eq    5f
        cmp     x2, x4
        b.lo    4b
5:      ror     x5, x5, #59
        add     x5, x5, x9
        b       3b

// The first byte, then the first of every page behind it. ARG0: bytes of a page; ARG1: whether to write it back.
touch:
        neg     x8, x5
        ldr     x7, [x19, #ARG1]
1:      cmp     x2, x4
        b.hs    done
        ldrb    w9, [x2]
        cbz     x7, 2f
        strb    w9, [x2]
2:      add     x2, x2, x5
        and     x2, x2, x8
        b       1b

hypercall:
        mov     x0, x5
        ldr     x1, [x19, #ARG1]
        ldr     x2, [x19, #ARG2]
        ldr     x3, [x19, #ARG3]
        ldr     x4, [x19, #ARG4]
        hvc     #0
        mov     x5, x0
store:
        str     x5, [x19, #RESULT]
done:
        str     xzr, [x19, #COMMAND]
        b       ready

halt:
        str     xzr, [x19, #COMMAND]
        mov     w0, #(PSCI_SYSTEM_OFF & 0xffff)
        movk    w0, #(PSCI_SYSTEM_OFF >> 16), lsl #16
        hvc     #0
        b       ready

// Gives the host all of the agent's memory to see, page by page. A page that it sees already stays as it is.
share:
        mov     x21, x19
        add     x22, x19, #0x20, lsl #12
1:      mov     w0, #(MEM_SHARE & 0xffff)
        movk    w0, #(MEM_SHARE >> 16), lsl #16
        mov     x1, x21
        mov     x2, #0
        mov     x3, #0
        hvc     #0
        add     x21, x21, x20
        cmp     x21, x22
        b.lo    1b
        b       ready

// The host reads what is asked in the mailbox, and leaves its answer there.
ask:
        mov     w0, #ASK
        ldr     x1, [x19, #DOORBELL]
        str     w0, [x1]
        b       done

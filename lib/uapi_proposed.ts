/**
 * Numbers of interfaces that are proposed: those of one posting each. Released kernels use some of them for other things, so nothing here is
 * asked of a running kernel by number alone: what it can do is found by trying it on a scratch object.
 */

/** On a guest_memfd: its number is that of KVM_SET_MEMORY_ATTRIBUTES, its struct is longer. */
export const KVM_SET_MEMORY_ATTRIBUTES2 = 0xc080aed2;
/** The converted pages read as zeros. */
export const SET_MEMORY_ATTRIBUTES2_ZERO = 1;
/** The converted pages keep what they hold. */
export const SET_MEMORY_ATTRIBUTES2_PRESERVE = 2;
export const SET_MEMORY_ATTRIBUTES2_FLAGS = SET_MEMORY_ATTRIBUTES2_ZERO | SET_MEMORY_ATTRIBUTES2_PRESERVE;

/** On a VM: a guest_memfd of another VM as a file of this one. */
export const KVM_LINK_GUEST_MEMFD = 0xc040aed6;

/** Of F_ADD_SEALS: the file is for a guest alone. Its first posting said 0x20, which has become F_SEAL_EXEC since. */
export const F_SEAL_GUEST = 0x40;

/** A file with large folios; their size as its binary logarithm from GUEST_MEMFD_HUGE_SHIFT on: 21 or 30. */
export const GUEST_MEMFD_FLAG_HUGETLB = 4;
export const GUEST_MEMFD_HUGE_SHIFT = 58n;
/** A file that read(2), write(2) and their relatives work on, as far as its pages are shared or not there yet. */
export const GUEST_MEMFD_FLAG_WRITE = 8;

/**
 * Of mmap(2), with MAP_SHARED_VALIDATE: a mapping of a guest_memfd that gives way to conversions. Its page tables have a page exactly while
 * the page is shared, so it stands in nobody's way.
 */
export const MAP_GUEST_SHARED = 0x200000;

/** KVM_CAP_* by name. */
export const KVM_CAP_PROPOSED = {
  /** Memslots can be locked. Released kernels have KVM_CAP_VM_GPA_BITS under this number, which cannot be enabled. */
  ARM_LOCK_USER_MEMORY_REGION: 207,
  /** The attributes KVM_SET_MEMORY_ATTRIBUTES2 takes on a guest_memfd of this VM. */
  GUEST_MEMFD_MEMORY_ATTRIBUTES: 246,
  /** The content modes it takes as flags. */
  MEMORY_ATTRIBUTES2_FLAGS: 247,
  /** A guest grants pages in a ring of at most so many entries. args: [guest physical address of its page, entries]. */
  GRANT_RING: 248,
} as const;

/** Of KVM_ENABLE_CAP with ARM_LOCK_USER_MEMORY_REGION: what to do, as its flags. args[0] is the slot, args[1] one of those below. */
export const KVM_LOCK_MEMORY_REGION = 1;
export const KVM_UNLOCK_MEMORY_REGION = 2;
export const KVM_LOCK_MEM_READ = 1;
export const KVM_LOCK_MEM_WRITE = 2;
export const KVM_UNLOCK_MEM_ALL = 1;

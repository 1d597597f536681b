/** Mutants that nothing can notice, and why: `list rule: kind`. */
const explanations: Readonly<Record<string, string>> = {
  'memslot gmem-kind: removed': 'gmem-vm, next, says EINVAL too of a file that is no guest_memfd of this VM',
  'memslot gmem-end: swapped with the next': 'the next one applies before 7.2 only, where both are EINVAL',
  'memslot gmem-binding-overlap: swapped with the next': 'this one applies before 7.2 only, where both are EINVAL',
  'memslot gpa-limit: swapped with the next': 'one applies to x86, the other to arm64',
  'memslot gmem-needs-mmap: swapped with the next':
    'a file that lacks MMAP has no binding on arm64 that another could overlap',
  'getDirtyLog no-dirty-log: removed': 'where there is no log the call has nothing to read, and says ENOENT itself',
  'mmap mmap-length: swapped with the next': 'a length of 0 does not wrap',
  'mmap mmap-length-wraps: removed': 'mmap-room says ENOMEM of these lengths too',
  'mmap not-mappable: swapped with the next': 'the next one is about secret memory, which can be mapped',
  'lock lock-slot-id: removed': 'lock-absent says EINVAL too of a slot that no VM can have',
  'unlock lock-slot-id: removed': 'unlock-absent says EINVAL too of a slot that no VM can have',
};

/** Calls that nobody's kernel has: an order of checks is ours alone, and no program may depend on it. */
const proposed: readonly string[] = [
  'conversion',
  'grantRing',
  'guestSeal',
  'guestFileFallocate',
  'transfer',
  'link',
  'lock',
  'unlock',
  'lockedSlot',
  'lockedRange',
];
const orderOfProposal = 'the posting leaves open which is asked first';

/** Why a mutant that nothing noticed could not be, or null. */
export function explainSurvivor(list: string, rule: string, kind: string): string | null {
  const isOrder = kind.startsWith('swapped');
  if (isOrder && (proposed.includes(list) || rule === 'gmem-allocate-end')) return orderOfProposal;
  return explanations[`${list} ${rule}: ${kind}`] ?? null;
}

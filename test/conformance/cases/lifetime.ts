import { KVM_VM_TYPE_ARM_PROTECTED } from '../../../lib/uapi.ts';
import { closeFile } from '../child_programs.ts';
import { gmemSlots, protectedVm, shareable } from '../needs.ts';
import { type Expected, INIT_SHARED, MMAP, type Scenario, scenario, section } from '../scenario.ts';

const bindingOverlap: Expected = { since: { '7.2': 'EEXIST' }, before: 'EINVAL' };

/** Slot 0 at pages [0, 4), bound to pages [0, 4) of a file of 16. */
const boundSlot = (s: Scenario) => {
  const vm = s.gmemVm();
  const file = s.bindable(vm, 16);
  if (s.bind(vm, { pages: 4, file }) !== 0) throw new Error('setup: the slot was refused');
  return { vm, file };
};

export const lifetimes = section('Lifetimes', [
  scenario(161, 'the only fd of a bound file is closed: the slot stays where it is', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [s.closeFd(file), s.slot(vm, { slot: 1, at: 3 }), s.slot(vm, { slot: 1, at: 4 })],
    expect: [0, 'EEXIST', 0],
  }),
  scenario(162, 'an orphaned slot can be deleted, and then created again', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [
      s.closeFd(file),
      s.remove(vm, 0),
      s.bind(vm, { pages: 4, file: s.bindable(vm, 4) }),
      s.slot(vm, { slot: 1, at: 3 }),
    ],
    expect: [0, 0, 0, 'EEXIST'],
  }),
  scenario('162 V1', 'an orphaned slot can be deleted with V1', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [s.closeFd(file), s.slotV1(vm, { size: 0 }), s.slotV1(vm, { size: 0 })],
    expect: [0, 0, 'EINVAL'],
  }),
  scenario('11 orphan', 'an orphaned slot can be neither bound again nor changed', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => {
      const other = s.bindable(vm, 4);
      return [
        s.closeFd(file),
        s.bind(vm, { pages: 4, file: other }),
        s.bind(vm, { pages: 4, file: -1 }),
        s.bind(vm, { slot: 1, at: 100, pages: 4, file: other }),
      ];
    },
    expect: [0, 'EINVAL', 'EINVAL', 0],
  }),
  scenario(
    '11 orphan toggle',
    'an orphaned slot does not become an ordinary one: the boundary refuses that everywhere',
    {
      needs: [gmemSlots],
      given: boundSlot,
      when: (s, { vm, file }) => [s.closeFd(file), s.slot(vm, { pages: 4 }), s.slotV1(vm, { pages: 4 })],
      expect: [0, 'EINVAL', 'EINVAL'],
    },
  ),
  scenario('11 dup', 'a dup keeps file and bindings', {
    needs: [gmemSlots],
    given: (s) => {
      const world = boundSlot(s);
      return { ...world, copy: s.dup(world.file) };
    },
    when: (s, { vm, file, copy }) => [
      s.fallocate(file, 1, 0, 2),
      s.closeFd(file),
      s.cached(copy),
      s.bind(vm, { slot: 1, at: 100, pages: 4, file: copy, from: 3 }),
      s.bind(vm, { slot: 1, at: 100, pages: 4, file: copy, from: 4 }),
      s.remove(vm, 0),
      s.bind(vm, { slot: 2, at: 200, pages: 4, file: copy }),
    ],
    expect: [0, 0, 2, bindingOverlap, 0, 0, 0],
  }),
  scenario('11 mapping', 'a mapping keeps the file, the last munmap orphans the slot', {
    needs: [shareable],
    given: (s) => {
      const vm = s.vm();
      const file = s.gmem(vm, 16, MMAP | INIT_SHARED);
      const mapping = s.map(file);
      return { vm, file, mapping };
    },
    when: (s, { vm, file, mapping }) => [
      s.bind(vm, { pages: 4, file }),
      s.put(mapping, 0, 7),
      s.closeFd(file),
      s.get(mapping, 0),
      s.munmap(mapping),
      s.slot(vm, { slot: 1 }),
      s.remove(vm, 0),
      s.slot(vm, { slot: 1 }),
    ],
    expect: [0, 1, 0, 7, 0, 'EEXIST', 0, 0],
  }),
  scenario(164, 'the VM fd is closed: its guest_memfd can still not be bound to another VM', {
    needs: [gmemSlots],
    given: (s) => ({ ...boundSlot(s), other: s.gmemVm() }),
    when: (s, { vm, file, other }) => [
      s.closeFd(vm),
      s.bind(other, { pages: 4, file }),
      s.bind(other, { file, from: 8 }),
    ],
    expect: [0, 'EINVAL', 'EINVAL'],
  }),
  scenario(165, 'the VM fd is closed: its guest_memfd still works', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [
      s.closeFd(vm),
      s.fallocate(file, 1, 0, 16),
      s.cached(file),
      s.fallocate(file, 3, 0, 16),
      s.cached(file),
      s.stat(file).size,
      s.closeFd(file),
    ],
    expect: (s) => [0, 0, 16, 0, 0, 16 * s.P, 0],
  }),
  scenario(166, 'the number of a closed guest_memfd names a memfd: binding it is EINVAL', {
    needs: [gmemSlots],
    given: (s) => {
      const vm = s.gmemVm();
      return { vm, file: s.bindable(vm, 4) };
    },
    when: (s, { vm, file }) => [s.closeFd(file), s.memfd(4) === file, s.bind(vm, { file })],
    expect: [0, true, 'EINVAL'],
  }),
  scenario('11 fork', 'a child process closes its copy: nothing changes for the parent', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [
      s.fallocate(file, 1, 0, 2),
      s.inChild(closeFile, [file]),
      s.cached(file),
      s.bind(vm, { slot: 1, at: 100, pages: 4, file, from: 3 }),
    ],
    expect: [0, [0], 2, bindingOverlap],
  }),
  scenario('11 gmem keeps VM', 'a VM without a fd and its file are both gone after the last close', {
    needs: [gmemSlots],
    given: boundSlot,
    when: (s, { vm, file }) => [s.closeFd(vm), s.closeFd(file), s.closeFd(file), s.slot(vm)],
    expect: [0, 0, 'EBADF', 'EBADF'],
  }),
  scenario('11 last close', 'the pages go with the last reference', {
    needs: [shareable],
    given: (s) => {
      const vm = s.vm();
      const file = s.gmem(vm, 4, MMAP | INIT_SHARED);
      return { vm, file, mapping: s.map(file, { pages: 4 }) };
    },
    when: (s, { vm, file, mapping }) => {
      const copy = s.dup(file);
      return [
        s.put(mapping, 0, 7),
        s.closeFd(file),
        s.munmap(mapping),
        s.get(s.map(copy, { pages: 1 }), 0),
        s.get(s.map(s.gmem(vm, 4, MMAP | INIT_SHARED), { pages: 1 }), 0),
      ];
    },
    expect: [1, 0, 0, 7, 0],
  }),
]);

export const protectedSlots = section('Slots of a protected VM (arm64)', [
  scenario(250, 'a read-only or logged slot is EPERM', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) => [2, 1, 3].map((flags) => s.slot(vm, { flags })),
    expect: ['EPERM', 'EPERM', 'EPERM'],
  }),
  scenario('250 change', 'LOG_DIRTY cannot be added, in place or with a move', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) => [s.slot(vm), s.slot(vm, { flags: 1 }), s.slot(vm, { at: 8, flags: 1 }), s.slot(vm)],
    expect: [0, 'EPERM', 'EPERM', 0],
  }),
  scenario(251, 'EPERM comes before the address limit, and after the overlap', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) => [
      s.slot(vm, { gpa: 1n << 60n, flags: 2 }),
      s.slot(vm, { gpa: 1n << 60n }),
      s.slot(vm),
      s.slot(vm, { slot: 1, flags: 2 }),
    ],
    expect: ['EPERM', 'EFAULT', 0, 'EEXIST'],
  }),
  scenario('17.1 before the first run', 'before the VM has run, slots can be moved and deleted', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) => [s.slot(vm), s.slot(vm, { at: 8 }), s.remove(vm, 0), s.slot(vm)],
    expect: [0, 0, 0, 0],
  }),
  scenario('17.1 bind', 'a file with MMAP can be bound, one without cannot', {
    needs: [protectedVm],
    given: (s) => s.vm(KVM_VM_TYPE_ARM_PROTECTED),
    when: (s, vm) => [
      s.bind(vm, { file: s.gmem(vm, 4, MMAP) }),
      s.bind(vm, { slot: 1, at: 8, file: s.gmem(vm, 4, 0) }),
      s.bind(vm, { slot: 1, at: 8, file: s.gmem(vm, 4, INIT_SHARED) }),
    ],
    expect: [0, 'EINVAL', 'EINVAL'],
  }),
]);

import t from 'tap';
import { GiB, type Memslot } from '../lib/index.ts';
import { everywhere, refused, withPrivate } from './backends.ts';

// Memslots: numbers, address spaces, backings, moving, dirty logs, removal.

const addresses = (slots: Iterable<Memslot>) => [...slots].map(({ address }) => address);

await everywhere(t, 'a slot says what it is', (t, { vm, P, host, closed }) => {
  const [memory, file] = [host(8), closed(8)];
  const slot = vm.createMemslot({
    address: GiB,
    size: 2 * P,
    hostMemory: memory,
    hostOffset: 3 * P,
    guestMemfd: file,
    guestMemfdOffset: 5 * P,
  });
  t.match(slot, {
    slot: 0,
    address: GiB,
    size: 2 * P,
    readonly: false,
    logDirtyPages: false,
    hostOffset: 3 * P,
    guestMemfdOffset: 5 * P,
    removed: false,
  });
  t.equal(slot.hostMemory, memory);
  t.equal(slot.guestMemfd, file);
  t.equal(vm.memslots.get(0), slot);
  t.equal(vm.memslotAt(GiB), slot);
  t.equal(vm.memslotAt(GiB + 2 * P - 1), slot);
  t.equal(vm.memslotAt(GiB + 2 * P), undefined);
  t.equal(vm.memslotAt(GiB - 1), undefined);
  const plain = vm.createMemslot({ address: 0, size: P, hostMemory: memory });
  t.equal(plain.guestMemfd, null);
  const bare = vm.createMemslot({ address: P, size: P, guestMemfd: file });
  t.equal(bare.hostMemory, null);
});

await everywhere(t, 'numbers: the lowest free one, unless one is asked for', (t, { vm, P, host }) => {
  const memory = host(1);
  let next = 0;
  const create = (slot?: number) =>
    vm.createMemslot({ address: next++ * P, size: P, hostMemory: memory, ...(slot === undefined ? {} : { slot }) });
  const slots = [create(), create(), create(7), create()];
  t.same(
    slots.map(({ slot }) => slot),
    [0, 1, 7, 2],
  );
  slots[1]?.remove();
  t.equal(create().slot, 1);
  t.equal(create().slot, 3);
  const last = vm.capabilities.memslots - 1;
  t.equal(create(last).slot, last);
  refused(t, () => create(last + 1), 'EINVAL', `slot ${last + 1}`, `${last}`);
  refused(t, () => create(7), 'EEXIST', 'memslot 7', 'remove it first');
  refused(t, () => create(0x10000), 'ERR_OUT_OF_RANGE', 'slot');
  t.same(
    [...vm.memslots.keys()].sort((a, b) => a - b),
    [0, 1, 2, 3, 7, last],
  );
});

await everywhere(t, 'address spaces', (t, { vm, P, host }) => {
  const memory = host(2);
  const normal = vm.createMemslot({ address: 0, size: P, hostMemory: memory });
  const management = () =>
    vm.createMemslot({ addressSpace: 1, address: 0, size: P, hostMemory: memory, hostOffset: P });
  if (vm.capabilities.addressSpaces === 2) {
    const slot = management();
    t.equal(slot.slot, 0x10000, 'slot 0 of address space 1');
    t.equal(vm.memslots.get(0x10000), slot);
    t.equal(vm.memslotAt(0), normal, 'addresses are those of address space 0');
    vm.memory.write(0, Uint8Array.of(1));
    t.same([memory.bytes()[0], memory.bytes()[P]], [1, 0]);
    const view = vm.memory.view(0, P);
    slot.move(P);
    slot.remove();
    t.equal(view.length, P, 'its end is none of address space 0');
    t.equal(vm.memslotAt(0), normal);
  } else refused(t, management, 'EINVAL', 'address space 1');
  refused(
    t,
    () => vm.createMemslot({ addressSpace: 2, address: 0, size: P, hostMemory: memory }),
    'EINVAL',
    'address space 2',
  );
  refused(
    t,
    () => vm.createMemslot({ addressSpace: 0x10000, address: 0, size: P, hostMemory: memory }),
    'ERR_OUT_OF_RANGE',
  );
});

await withPrivate(t, 'a VM with private memory has one address space', (t, { vm, P, host }) => {
  refused(
    t,
    () => vm.createMemslot({ addressSpace: 1, address: 0, size: P, hostMemory: host(1) }),
    'EINVAL',
    'address space 1',
  );
});

await everywhere(t, 'ranges: aligned, and no two overlap', (t, { vm, P, host }) => {
  const memory = host(8);
  vm.createMemslot({ slot: 2, address: 4 * P, size: 4 * P, hostMemory: memory });
  for (const [address, size] of [
    [0, 5 * P],
    [7 * P, P],
    [5 * P, P],
    [4 * P, 4 * P],
    [0, 8 * P],
  ] as const) {
    const error = refused(
      t,
      () => vm.createMemslot({ slot: 3, address, size, hostMemory: memory }),
      'EEXIST',
      'slot 3',
      'overlaps slot 2',
    );
    t.match(error, {
      syscall: 'ioctl',
      request: 'KVM_SET_USER_MEMORY_REGION',
      errno: -17,
      args: { slot: 3, guestPhysAddr: address },
    });
  }
  vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory });
  vm.createMemslot({ address: 8 * P, size: P, hostMemory: memory });
  refused(
    t,
    () => vm.createMemslot({ address: GiB + 1, size: P, hostMemory: memory }),
    'EINVAL',
    'guest address',
    String(P),
  );
  refused(t, () => vm.createMemslot({ address: GiB, size: P + 1, hostMemory: memory }), 'EINVAL', 'size', String(P));
  refused(
    t,
    () => vm.createMemslot({ address: GiB, size: P, hostMemory: memory, hostOffset: 1 }),
    'EINVAL',
    'hostOffset',
  );
  refused(
    t,
    () => vm.createMemslot({ address: GiB, size: 8 * P, hostMemory: memory, hostOffset: P }),
    'ERR_OUT_OF_RANGE',
    'hostOffset',
    'past the end',
  );
  refused(t, () => vm.createMemslot({ address: GiB, size: P }), 'ERR_INVALID_ARG_TYPE', 'hostMemory');
  t.same(
    addresses(vm.memslots.values()).sort((a, b) => a - b),
    [0, 4 * P, 8 * P],
    'what was refused left nothing',
  );
});

await everywhere(t, 'a guest_memfd is bound once, byte by byte', (t, { vm, P, closed }) => {
  const file = closed(8);
  const bind = (slot: number, offset: number, pages: number) =>
    vm.createMemslot({ slot, address: slot * GiB, size: pages * P, guestMemfd: file, guestMemfdOffset: offset });
  const first = bind(0, 0, 4);
  bind(1, 4 * P, 2);
  const release = vm.kvm.kernelRelease.split('.').map(Number) as [number, number];
  const code = release[0] > 7 || (release[0] === 7 && release[1] >= 2) ? 'EEXIST' : 'EINVAL';
  const taken = refused(
    t,
    () => bind(2, 3 * P, 1),
    code,
    'slot 2',
    'slot 0',
    `0x${(3 * P).toString(16)}`,
    'remove slot 0',
  );
  t.match(taken, { request: 'KVM_SET_USER_MEMORY_REGION2', args: { guestMemfdOffset: 3 * P, flags: 4 } });
  refused(t, () => bind(2, 6 * P, 3), 'ERR_OUT_OF_RANGE', 'past the end of the guest_memfd');
  refused(t, () => bind(2, 6 * P + 1, 1), 'EINVAL', 'guestMemfdOffset');
  first.remove();
  bind(2, 3 * P, 1);
  refused(
    t,
    () => vm.createMemslot({ address: 9 * GiB, size: P, guestMemfd: file, guestMemfdOffset: 7 * P, readonly: true }),
    'EINVAL',
    'neither read-only nor dirty-logged',
  );
  refused(
    t,
    () =>
      vm.createMemslot({ address: 9 * GiB, size: P, guestMemfd: file, guestMemfdOffset: 7 * P, logDirtyPages: true }),
    'EINVAL',
    'neither read-only nor dirty-logged',
  );
  t.same([...vm.memslots.keys()].sort(), [1, 2]);
});

await everywhere(t, 'arm64 binds only files that can be mapped', (t, { backend, vm, P, host }) => {
  const bind = () =>
    vm.createMemslot({ address: 0, size: P, guestMemfd: vm.createGuestMemfd({ size: P }), hostMemory: host(1) });
  if (backend.isArm) refused(t, bind, 'EINVAL');
  else t.equal(bind().slot, 0);
});

await everywhere(t, 'content stays when a slot goes', (t, { vm, P, shared }) => {
  const file = shared(4);
  const slot = vm.createMemslot({ address: 0, size: 4 * P, guestMemfd: file });
  vm.memory.write(P, Uint8Array.of(5));
  slot.remove();
  vm.createMemslot({ address: GiB, size: 2 * P, guestMemfd: file, guestMemfdOffset: P });
  t.equal(vm.memory.read(GiB, 1)[0], 5);
  t.equal(file.bytes()[P], 5);
});

await everywhere(t, 'move', (t, { vm, P, host, closed }) => {
  const memory = host(4);
  const slot = vm.createMemslot({ address: 0, size: 2 * P, hostMemory: memory });
  const other = vm.createMemslot({ address: 8 * P, size: 2 * P, hostMemory: memory, hostOffset: 2 * P });
  memory.bytes()[0] = 3;
  const [view, far] = [vm.memory.view(0, P), vm.memory.view(8 * P, P)];
  slot.move(4 * P);
  t.equal(view.length, 0, 'a view at the old address is detached');
  if (vm.kvm.backend === 'kvm') t.equal(far.length, P, 'views elsewhere stay');
  t.equal(slot.address, 4 * P);
  t.equal(vm.memslotAt(0), undefined);
  t.equal(vm.memslotAt(5 * P), slot);
  t.equal(vm.memory.read(4 * P, 1)[0], 3);
  slot.move(3 * P);
  t.equal(vm.memslotAt(3 * P), slot, 'onto its own old range');
  t.equal(vm.memslotAt(5 * P), undefined);
  slot.move(3 * P);
  t.equal(vm.memslotAt(3 * P), slot, 'to where it is');
  const error = refused(t, () => slot.move(7 * P), 'EEXIST', 'overlaps slot 1');
  t.equal(error.request, 'KVM_SET_USER_MEMORY_REGION');
  t.equal(slot.address, 3 * P, 'a refused move changes nothing');
  t.equal(vm.memslotAt(7 * P), undefined);
  t.equal(vm.memslotAt(8 * P), other);
  refused(t, () => slot.move(1), 'EINVAL', 'guest address');
  refused(t, () => slot.move(-P), 'ERR_OUT_OF_RANGE');
  refused(t, () => slot.move(2 ** 53), 'ERR_OUT_OF_RANGE');
  const fixed = vm.createMemslot({ address: GiB, size: P, guestMemfd: closed(1) });
  refused(t, () => fixed.move(2 * GiB), 'EINVAL', 'guest_memfd', 'deleted and created again');
  t.equal(vm.memslotAt(GiB), fixed);
});

await everywhere(t, 'dirty logs', (t, { vm, P, host, closed }) => {
  const slot = vm.createMemslot({ address: 0, size: 130 * P, hostMemory: host(130) });
  t.match(
    refused(t, () => slot.dirtyPages(), 'ENOENT', 'slot 0', 'does not log'),
    { request: 'KVM_GET_DIRTY_LOG' },
  );
  t.match(
    refused(t, () => slot.clearDirtyPages(), 'ENOENT'),
    { request: 'KVM_CLEAR_DIRTY_LOG' },
  );
  slot.setLogDirtyPages(true);
  t.equal(slot.logDirtyPages, true);
  t.same(slot.dirtyPages(), [], 'no guest ran');
  vm.memory.write(0, Uint8Array.of(1));
  t.same(slot.dirtyPages(), [], 'the host’s own writes are not the guest’s');
  slot.setLogDirtyPages(true);
  slot.move(GiB);
  t.equal(slot.logDirtyPages, true, 'moves along');
  t.same(slot.dirtyPages(), []);
  for (const range of [
    undefined,
    { offset: 0, size: P },
    { offset: 65 * P, size: 3 * P },
    { offset: 129 * P, size: P },
    { offset: 63 * P, size: 2 * P },
  ])
    t.equal(slot.clearDirtyPages(range), undefined);
  refused(t, () => slot.clearDirtyPages({ offset: 1, size: P }), 'ERR_OUT_OF_RANGE', 'whole pages');
  refused(t, () => slot.clearDirtyPages({ offset: 130 * P, size: P }), 'ERR_OUT_OF_RANGE', 'past the end');
  refused(t, () => slot.clearDirtyPages({ offset: 0, size: 0 }), 'ERR_OUT_OF_RANGE');
  slot.setLogDirtyPages(false);
  t.equal(slot.logDirtyPages, false);
  refused(t, () => slot.dirtyPages(), 'ENOENT');
  const born = vm.createMemslot({
    address: 2 * GiB,
    size: P,
    hostMemory: host(1),
    logDirtyPages: true,
    readonly: true,
  });
  t.match(born, { logDirtyPages: true, readonly: true });
  t.same(born.dirtyPages(), []);
  const file = vm.createMemslot({ address: 3 * GiB, size: P, guestMemfd: closed(1) });
  refused(t, () => file.setLogDirtyPages(true), 'EINVAL', 'guest_memfd');
  t.equal(file.logDirtyPages, false);
});

await everywhere(t, 'removal', (t, { vm, P, host }) => {
  const memory = host(1);
  const create = () => vm.createMemslot({ slot: 0, address: 0, size: P, hostMemory: memory });
  const slot = create();
  const view = vm.memory.view(0, P);
  slot.remove();
  t.same([slot.removed, view.length, vm.memslots.size, vm.memslotAt(0)], [true, 0, 0, undefined]);
  slot.remove();
  const heir = create();
  slot.remove();
  slot[Symbol.dispose]();
  t.equal(vm.memslotAt(0), heir, 'removing a removed slot does not touch its heir');
  t.same([slot.address, slot.size, slot.slot, slot.hostMemory], [0, P, 0, memory], 'what it was can still be asked');
  for (const call of [
    () => slot.move(P),
    () => slot.setLogDirtyPages(true),
    () => slot.dirtyPages(),
    () => slot.clearDirtyPages(),
  ])
    refused(t, call, 'ERR_CLOSED', 'memslot 0');
  heir[Symbol.dispose]();
  t.equal(heir.removed, true);
  {
    using scoped = create();
    t.equal(scoped.removed, false);
  }
  t.equal(vm.memslots.size, 0);
});

await everywhere(t, 'the guest-physical limit', (t, { backend, kvm, P, host }) => {
  const vm = kvm.createVm();
  const memory = host(1);
  if (backend.isArm) {
    // A protected host gives every VM all the bits it has.
    const bits = kvm.vmTypes.has('protected') ? kvm.checkExtension('ARM_VM_IPA_SIZE') : 40;
    vm.createMemslot({ address: 2 ** bits - P, size: P, hostMemory: memory });
    refused(t, () => vm.createMemslot({ address: 2 ** bits, size: P, hostMemory: memory }), 'EFAULT');
  } else {
    refused(
      t,
      () => vm.createMemslot({ address: 2 ** 52, size: P, hostMemory: memory }),
      'EINVAL',
      'KVM_SET_USER_MEMORY_REGION',
    );
  }
  vm.close();
});

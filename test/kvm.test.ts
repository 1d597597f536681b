import { readdirSync } from 'node:fs';
import t from 'tap';
import { GuestMemfd, HostMemory, Kvm, KvmError, Memslot, MiB, Vm } from '../lib/index.ts';
import { type Backend, backends, errorOf, everywhere, onKvm, refused, withPrivate } from './backends.ts';

// Kvm and Vm: opening, capabilities, who owns whom, and what closing does.

const kvmOnly = (one: Backend): boolean => one.name === 'kvm';

await everywhere(t, 'Kvm says what it is', (t, { backend, kvm }) => {
  t.equal(kvm.backend, backend.name === 'kvm' ? 'kvm' : 'software');
  t.equal(kvm.fallbackReason, null, 'asked for by name, so no fallback');
  t.equal(kvm.apiVersion, 12);
  t.equal(kvm.arch, backend.isArm ? 'aarch64' : 'x86_64');
  if (backend.model) {
    t.equal(kvm.kernelRelease, backend.model.kernel);
    t.equal(kvm.pageSize, backend.model.pageSize ?? 4096);
    t.same([...kvm.vmTypes], backend.hasPrivate ? ['default', 'sw-protected'] : ['default']);
  } else {
    t.match(kvm.kernelRelease, /^\d+\.\d+/);
    t.ok(kvm.vmTypes.has('default'));
  }
  t.equal(kvm.checkExtension('USER_MEMORY'), 1);
  t.equal(kvm.checkExtension('KVM_CAP_USER_MEMORY'), 1);
  t.equal(kvm.checkExtension(3), 1);
  t.equal(kvm.checkExtension(99999), 0);
  const unknown = refused(t, () => kvm.checkExtension('NO_SUCH'), 'ERR_OUT_OF_RANGE', '"NO_SUCH"', 'GUEST_MEMFD');
  t.type(unknown, RangeError);
  refused(t, () => kvm.checkExtension('toString'), 'ERR_OUT_OF_RANGE');
  refused(t, () => kvm.checkExtension('__proto__'), 'ERR_OUT_OF_RANGE');
});

t.test('auto takes KVM where it opens, and says why where it does not', (t) => {
  using auto = Kvm.open();
  t.equal(auto.backend, onKvm ? 'kvm' : 'software');
  t.equal(auto.fallbackReason === null, onKvm);
  using fallback = Kvm.open({ device: '/nonexistent' });
  t.equal(fallback.backend, 'software');
  t.type(fallback.fallbackReason, KvmError);
  t.equal(fallback.fallbackReason?.code, 'UNSUPPORTED');
  using chosen = Kvm.open({ backend: 'software', device: '/nonexistent' });
  t.equal(chosen.fallbackReason, null);
  t.end();
});

t.test('a device that is not there, or is not KVM', { skip: process.platform !== 'linux' }, (t) => {
  const open = (device: string) => () => Kvm.open({ backend: 'kvm', device });
  const files = readdirSync('/proc/self/fd').length;
  if (onKvm) {
    refused(t, open('/nonexistent'), 'UNSUPPORTED', '/nonexistent', 'kvm_intel', '--device');
    refused(t, open('/dev/null'), 'UNSUPPORTED', '/dev/null is not KVM');
    const directory = errorOf(open('/'));
    t.type(directory, KvmError);
    t.equal(directory.syscall, 'open');
    t.equal(directory.args.path, '/');
  }
  refused(t, open('/dev/kvm\0'), 'ERR_INVALID_ARG_TYPE');
  t.equal(readdirSync('/proc/self/fd').length, files, 'what is not KVM is closed again');
  t.end();
});

t.test('software kernels that cannot be', (t) => {
  const open = (model: object) => () => Kvm.open({ backend: 'software', model });
  refused(t, open({ arch: 'riscv64' }), 'ERR_OUT_OF_RANGE', 'x86_64', 'riscv64');
  refused(t, open({ kernel: '5.4' }), 'ERR_OUT_OF_RANGE', '6.8', '5.4');
  refused(t, open({ pageSize: 8192 }), 'ERR_OUT_OF_RANGE', '4096');
  refused(t, open({ arch: 'aarch64', swProtected: true }), 'ERR_OUT_OF_RANGE', 'x86_64');
  refused(t, open({ tdp: false, swProtected: true }), 'ERR_OUT_OF_RANGE', 'tdp');
  refused(t, open({ pkvm: true }), 'ERR_OUT_OF_RANGE', 'aarch64');
  t.end();
});

await everywhere(t, 'VM types', (t, { backend, kvm }) => {
  using vm = kvm.createVm();
  t.equal(vm.type, 'default');
  t.equal(vm.kvm, kvm);
  refused(t, () => kvm.createVm({ type: 'tdx' }), 'UNSUPPORTED', "'tdx'", /Intel|x86/, 'default');
  if (!backend.hasPrivate) refused(t, () => kvm.createVm({ type: 'sw-protected' }), 'UNSUPPORTED', 'SW_PROTECTED');
  else {
    using other = kvm.createVm({ type: 'sw-protected' });
    t.equal(other.type, 'sw-protected');
  }
  refused(t, () => kvm.createVm({ type: 'nonsense' as 'default' }), 'ERR_OUT_OF_RANGE', 'sw-protected');
  // A protected host gives every VM all the bits it has.
  if (backend.isArm && !kvm.vmTypes.has('protected')) {
    using small = kvm.createVm({ ipaBits: 36 });
    using memory = kvm.createHostMemory({ size: kvm.pageSize });
    small.createMemslot({ address: 2 ** 36 - kvm.pageSize, size: kvm.pageSize, hostMemory: memory });
    refused(t, () => small.createMemslot({ address: 2 ** 36, size: kvm.pageSize, hostMemory: memory }), 'EFAULT');
    small.close();
    refused(t, () => kvm.createVm({ ipaBits: 60 }), 'EINVAL', '60');
  } else if (!backend.isArm) {
    refused(t, () => kvm.createVm({ ipaBits: 40 }), 'UNSUPPORTED', 'aarch64');
  }
  refused(t, () => kvm.createVm({ ipaBits: 31 }), 'ERR_OUT_OF_RANGE', 'ipaBits');
});

t.test('capabilities are asked of the VM, model by model', (t) => {
  const of = (model: object, type: 'default' | 'sw-protected' = 'default') => {
    using kvm = Kvm.open({ backend: 'software', model });
    using vm = kvm.createVm({ type });
    return vm.capabilities;
  };
  const none = {
    guestMemfd: false,
    guestMemfdMmap: false,
    guestMemfdInitShared: false,
    memoryAttributes: 0n,
    conversion: 'none',
  };
  t.match(of({ kernel: '6.8' }), none);
  t.match(of({ kernel: '6.8' }, 'sw-protected'), {
    ...none,
    guestMemfd: true,
    memoryAttributes: 8n,
    conversion: 'attributes',
  });
  t.match(of({ kernel: '6.8' }), { preFaultMemory: false, memoryFaultExit: true });
  t.match(of({ kernel: '6.11' }), { preFaultMemory: true });
  t.match(of({ kernel: '6.18', swProtected: false, tdp: false }), {
    guestMemfd: true,
    guestMemfdMmap: true,
    guestMemfdInitShared: true,
    memoryAttributes: 0n,
    conversion: 'none',
    preFaultMemory: false,
    mapGpaRangeExit: true,
    memoryFaultExit: true,
    memslots: 32764,
    addressSpaces: 2,
  });
  t.match(of({}, 'sw-protected'), {
    guestMemfd: true,
    guestMemfdMmap: true,
    guestMemfdInitShared: false,
    memoryAttributes: 8n,
    conversion: 'attributes',
    addressSpaces: 1,
  });
  t.match(of({ arch: 'aarch64', kernel: '6.11' }), { ...none, memoryFaultExit: false });
  t.match(of({ arch: 'aarch64' }), {
    guestMemfd: true,
    guestMemfdMmap: true,
    guestMemfdInitShared: true,
    conversion: 'none',
    preFaultMemory: false,
    mapGpaRangeExit: false,
    memoryFaultExit: true,
    memslots: 32767,
    addressSpaces: 1,
  });
  t.end();
});

await everywhere(t, 'capabilities say how they are known', (t, { backend, kvm, vm }) => {
  const { evidence, ...features } = vm.capabilities;
  t.same(Object.keys(evidence).sort(), Object.keys(features).sort());
  const how = kvmOnly(backend) ? ['reported', 'probed'] : ['modelled'];
  for (const [feature, known] of Object.entries(evidence)) {
    const tried = feature.startsWith('conversion') && known === 'probed';
    t.ok(tried || how.includes(known), `${feature}: ${known}`);
  }
  t.equal(vm.capabilities, vm.capabilities, 'asked once');
  t.equal(vm.checkExtension('NR_MEMSLOTS'), vm.capabilities.memslots);
  t.equal(vm.checkExtension('GUEST_MEMFD') > 0, vm.capabilities.guestMemfd);
  t.equal(BigInt(vm.checkExtension(233)), vm.capabilities.memoryAttributes);
  t.ok(kvm.checkExtension('GUEST_MEMFD') >= 0);
});

await everywhere(t, 'guest_memfd: what a VM cannot create', (t, { vm, P }) => {
  refused(t, () => vm.createGuestMemfd({ size: P + 1 }), 'EINVAL', 'KVM_CREATE_GUEST_MEMFD', 'page size');
  const flags = refused(t, () => vm.createGuestMemfd({ size: P, flags: 1n << 40n }), 'EINVAL', '0x10000000000');
  t.match(flags, { syscall: 'ioctl', request: 'KVM_CREATE_GUEST_MEMFD', args: { size: P } });
  t.equal(flags.errno, -22);
  refused(t, () => vm.createGuestMemfd({ size: 0 }), 'ERR_OUT_OF_RANGE');
  refused(t, () => vm.createGuestMemfd({ size: P, flags: -1n }), 'ERR_OUT_OF_RANGE');
  refused(t, () => vm.createGuestMemfd({ size: P, flags: 1n << 64n }), 'ERR_OUT_OF_RANGE');
  refused(t, () => vm.createGuestMemfd({ size: P, flags: 1 as unknown as bigint }), 'ERR_INVALID_ARG_TYPE');
  using huge = vm.createGuestMemfd({ size: 2 ** 52 });
  t.equal(huge.size, 2 ** 52, 'nothing is allocated');
  t.equal(huge.residentBytes(), 0);
});

t.test('guest_memfd: kernels and VM types without it', (t) => {
  using old = Kvm.open({ backend: 'software', model: { kernel: '6.8' } });
  refused(
    t,
    () => old.createVm().createGuestMemfd({ size: 4096 }),
    'UNSUPPORTED',
    "'default'",
    '6.8',
    'KVM_CAP_GUEST_MEMFD',
    '6.18',
  );
  const vm = old.createVm({ type: 'sw-protected' });
  vm.createGuestMemfd({ size: 4096 });
  refused(t, () => vm.createGuestMemfd({ size: 4096, mmap: true }), 'UNSUPPORTED', '`mmap`', '6.18');
  using kvm = Kvm.open({ backend: 'software' });
  const newer = kvm.createVm({ type: 'sw-protected' });
  t.equal(newer.createGuestMemfd({ size: 4096, mmap: true }).flags, 1n);
  refused(
    t,
    () => newer.createGuestMemfd({ size: 4096, mmap: true, initShared: true }),
    'UNSUPPORTED',
    '`initShared`',
    "'sw-protected'",
  );
  t.end();
});

await everywhere(t, 'closing a Kvm closes everything', (t, { kvm, vm, P, host, shared }) => {
  const [memory, file] = [host(4), shared(4)];
  const slot = vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory });
  const bound = vm.createMemslot({ address: 4 * P, size: 4 * P, guestMemfd: file });
  const views = [memory.bytes(), file.bytes(), vm.memory.view(0, P), vm.memory.view(4 * P, P)];
  for (const view of views) t.ok(view.length > 0);
  kvm.close();
  t.same(
    [kvm, vm, memory, file].map(({ closed }) => closed),
    [true, true, true, true],
  );
  t.same([slot.removed, bound.removed], [true, true]);
  t.same(
    views.map(({ length }) => length),
    [0, 0, 0, 0],
    'every view is detached',
  );
  t.equal(vm.memslots.size, 0);
  for (const one of [kvm, vm, memory, file]) one.close();
  for (const one of [slot, bound]) one.remove();
  t.pass('again does nothing');
  const calls: Record<string, () => unknown> = {
    'kvm.vmTypes': () => kvm.vmTypes,
    'kvm.checkExtension': () => kvm.checkExtension(3),
    'kvm.createVm': () => kvm.createVm(),
    'kvm.createHostMemory': () => kvm.createHostMemory({ size: P }),
    'vm.capabilities': () => vm.capabilities,
    'vm.checkExtension': () => vm.checkExtension(3),
    'vm.createGuestMemfd': () => vm.createGuestMemfd({ size: P }),
    'vm.createMemslot': () => vm.createMemslot({ address: 0, size: P, hostMemory: memory }),
    'vm.setMemoryAttributes': () => vm.setMemoryAttributes({ address: 0, size: P }, { private: true }),
    'vm.convertSync': () => vm.convertSync({ address: 0, size: P }, 'shared'),
    'vm.describe': () => vm.describe(),
    'memory.read': () => vm.memory.read(0, 1),
    'memory.readInto': () => vm.memory.readInto(0, new Uint8Array(1)),
    'memory.write': () => vm.memory.write(0, new Uint8Array(1)),
    'memory.view': () => vm.memory.view(0, 1),
    'host.address': () => memory.address,
    'host.bytes': () => memory.bytes(),
    'host.discard': () => memory.discard({ offset: 0, size: P }),
    'host.residentBytes': () => memory.residentBytes(),
    'file.fd': () => file.fd,
    'file.bytes': () => file.bytes(),
    'file.allocate': () => file.allocate(),
    'file.punchHole': () => file.punchHole(),
    'file.residentBytes': () => file.residentBytes(),
    'file.pin': () => file.pin({ offset: 0, size: P }),
    'slot.move': () => slot.move(0),
    'slot.setLogDirtyPages': () => slot.setLogDirtyPages(true),
    'slot.dirtyPages': () => slot.dirtyPages(),
    'slot.clearDirtyPages': () => slot.clearDirtyPages(),
    'slot.lock': () => slot.lock('read'),
    'slot.unlock': () => slot.unlock(),
    'slot.residentBytes': () => slot.residentBytes(),
    'vm.unlockAll': () => vm.unlockAll(),
    'vm.statistics': () => vm.statistics(),
    'host.setNumaPolicy': () => memory.setNumaPolicy({ mode: 'local' }),
    'host.numaPolicyAt': () => memory.numaPolicyAt(0),
    'file.setNumaPolicy': () => file.setNumaPolicy({ mode: 'local' }),
    'file.numaPolicyAt': () => file.numaPolicyAt(0),
  };
  for (const [name, call] of Object.entries(calls)) {
    const error = errorOf(call);
    t.equal(error.code, 'ERR_CLOSED', name);
    t.type(error, KvmError);
    t.match(error.message, /is closed/);
  }
});

await everywhere(t, 'closing a VM leaves the rest', (t, { kvm, vm, P, host }) => {
  const memory = host(1);
  const file = vm.createGuestMemfd({ size: P });
  vm.createMemslot({ address: 0, size: P, hostMemory: memory });
  const other = kvm.createVm();
  vm.close();
  t.same([vm.closed, file.closed, memory.closed, other.closed, kvm.closed], [true, true, false, false, false]);
  memory.bytes()[0] = 7;
  other.createMemslot({ address: 0, size: P, hostMemory: memory });
  t.equal(other.memory.read(0, 1)[0], 7, 'its memory serves another VM');
  other.close();
  memory.close();
});

await everywhere(t, 'what a slot uses cannot be closed', (t, { vm, P, host, closed }) => {
  const [memory, file] = [host(2), closed(2)];
  const first = vm.createMemslot({ slot: 5, address: 0, size: P, hostMemory: memory });
  const second = vm.createMemslot({ slot: 6, address: P, size: P, guestMemfd: file });
  refused(t, () => memory.close(), 'EBUSY', 'memslot 5', 'remove the slot first');
  refused(t, () => file.close(), 'EBUSY', 'memslot 6', 'remove the slot first');
  t.same([memory.closed, file.closed], [false, false]);
  first.remove();
  second.remove();
  memory.close();
  file.close();
  t.same([memory.closed, file.closed], [true, true]);
});

await everywhere(t, 'Symbol.dispose takes the slots along', (t, { vm, P, host, closed }) => {
  const [memory, file] = [host(2), closed(2)];
  const slots = [
    vm.createMemslot({ address: 0, size: P, hostMemory: memory }),
    vm.createMemslot({ address: P, size: P, hostMemory: memory, hostOffset: P }),
    vm.createMemslot({ address: 2 * P, size: 2 * P, guestMemfd: file }),
  ];
  memory[Symbol.dispose]();
  t.same(
    slots.map(({ removed }) => removed),
    [true, true, false],
  );
  file[Symbol.dispose]();
  t.same(
    slots.map(({ removed }) => removed),
    [true, true, true],
  );
  t.equal(vm.memslots.size, 0);
  vm.createMemslot({ address: 0, size: P, hostMemory: host(1) });
});

await everywhere(t, 'the example program: using, in any order', async (t, { backend }) => {
  using kvm = backend.open();
  {
    using vm = kvm.createVm({ type: kvm.vmTypes.has('sw-protected') ? 'sw-protected' : 'default' });
    using file = vm.createGuestMemfd({ size: 64 * MiB, mmap: backend.isArm });
    using ram = kvm.createHostMemory({ size: 64 * MiB });
    const slot = vm.createMemslot({ address: 0, size: 64 * MiB, guestMemfd: file, hostMemory: ram });
    t.type(vm, Vm);
    t.type(file, GuestMemfd);
    t.type(ram, HostMemory);
    t.type(slot, Memslot);
    const range = { address: 16 * MiB, size: 8 * MiB };
    ram.bytes({ offset: 16 * MiB, size: 4 * MiB }).fill(1);
    if (backend.hasPrivate) {
      const report = await vm.convert(range, 'private');
      t.equal(report.freedBytes, 4 * MiB);
      t.same(vm.attributes.privateRanges(), [range]);
    } else {
      const error = await vm.convert(range, 'private').catch((reason) => reason);
      t.equal(error.code, 'UNSUPPORTED');
    }
  }
  {
    using ram = kvm.createHostMemory({ size: 4 * kvm.pageSize });
    using vm = kvm.createVm();
    using file = vm.createGuestMemfd({ size: 4 * kvm.pageSize, mmap: true });
    using slot = vm.createMemslot({ address: 0, size: 4 * kvm.pageSize, guestMemfd: file });
    vm.createMemslot({ address: 2 ** 30, size: kvm.pageSize, hostMemory: ram });
    t.equal(slot.removed, false);
  }
  t.pass('and in the other order');
});

await everywhere(t, 'describe() is plain data', (t, { backend, kvm, vm, P, host, shared, closed }) => {
  t.same(vm.describe(), {
    backend: kvm.backend,
    type: 'default',
    memslots: [],
    residentBytes: { shared: 0, private: 0 },
  });
  const [memory, open, shut] = [host(8), shared(4), closed(4)];
  vm.createMemslot({ slot: 3, address: 0, size: 8 * P, hostMemory: memory, readonly: true });
  vm.createMemslot({ slot: 4, address: 8 * P, size: 4 * P, guestMemfd: open });
  vm.createMemslot({ slot: 9, address: 12 * P, size: 4 * P, guestMemfd: shut, hostMemory: memory });
  memory.bytes({ offset: 0, size: 2 * P }).fill(1);
  open.bytes({ offset: 0, size: P }).fill(1);
  shut.allocate({ offset: 0, size: 3 * P });
  const about = vm.describe();
  t.same(structuredClone(about), about);
  t.same(about.residentBytes, { shared: 3 * P, private: 3 * P });
  t.match(about.memslots, [
    { slot: 3, address: 0, size: 8 * P, privateBytes: 0, backing: /anonymous .*read-only/ },
    { slot: 4, address: 8 * P, size: 4 * P, privateBytes: 0, backing: /guest_memfd .*shared with the host/ },
    { slot: 9, address: 12 * P, size: 4 * P, privateBytes: 0, backing: /anonymous .* \+ guest_memfd/ },
  ]);
  t.notMatch(about.memslots[2]?.backing, /shared with the host/);
  t.equal(about.backend, kvmOnly(backend) ? 'kvm' : 'software');
});

await withPrivate(t, 'describe() counts private bytes', (t, { vm, P, host, closed }) => {
  vm.createMemslot({ address: 0, size: 8 * P, hostMemory: host(8), guestMemfd: closed(8) });
  vm.setMemoryAttributes({ address: P, size: 2 * P }, { private: true });
  vm.setMemoryAttributes({ address: 7 * P, size: 4 * P }, { private: true });
  t.equal(vm.describe().memslots[0]?.privateBytes, 3 * P);
  t.equal(vm.describe().type, 'sw-protected');
});

t.test('several Kvms are apart from each other', (t) => {
  for (const backend of backends) {
    using one = backend.open();
    using two = backend.open();
    const P = one.pageSize;
    const memory = one.createHostMemory({ size: P });
    const vm = two.createVm();
    refused(t, () => vm.createMemslot({ address: 0, size: P, hostMemory: memory }), 'EINVAL', 'another Kvm');
    const file = one.createVm().createGuestMemfd({ size: P });
    refused(t, () => vm.createMemslot({ address: 0, size: P, guestMemfd: file }), 'EINVAL', 'another VM');
    refused(t, () => one.createVm().createMemslot({ address: 0, size: P, guestMemfd: file }), 'EINVAL', 'another VM');
    t.equal(vm.memslots.size, 0);
    two.close();
    t.equal(memory.closed, false);
  }
  t.end();
});

t.test('nobody constructs them by hand', (t) => {
  for (const one of [Kvm, Vm, GuestMemfd, HostMemory, Memslot]) {
    const make = one as unknown as new (...args: unknown[]) => unknown;
    for (const args of [[], [null], [Symbol('guest-memfd')], [{}, {}, {}, {}, {}]]) {
      refused(t, () => new make(...args), 'ERR_INVALID_ARG_TYPE', 'Illegal constructor', /create|open/);
    }
  }
  t.end();
});

t.test('KvmError', (t) => {
  const error = new KvmError({ code: 'EINVAL', errno: -22, message: 'why' });
  t.match(error, {
    name: 'KvmError',
    code: 'EINVAL',
    errno: -22,
    message: 'why',
    syscall: '',
    request: null,
    args: {},
  });
  t.equal('errorOffset' in error, false, 'only where one is known');
  t.ok(error instanceof Error);
  t.end();
});

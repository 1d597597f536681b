// Guest memory that changes hands: to a successor over a socket, to systemd, to a second VM and back.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import {
  CarveOut,
  GuestAgent,
  handOver,
  Kvm,
  type KvmError,
  MiB,
  preserveAcrossKexec,
  storeInSystemd,
  type TakenMemory,
  takeFromSystemd,
  takeOver,
  type Vm,
} from '../lib/index.ts';
import { ERRNO, SOCK_DGRAM, SOCK_SEQPACKET } from '../lib/uapi.ts';
import { backends, everywhere, type World as On, refused, rejection } from './backends.ts';
import { describe, INIT_SHARED, MMAP } from './conformance/scenario.ts';
import { child } from './lifecycle/child_process.ts';
import { onLinux, World } from './proposals/world.ts';

const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
t.teardown(() => rmSync(folder, { recursive: true }));
/** What a successor says that has mapped the memory. */
const BUILT = Uint8Array.of(1);
let sockets = 0;
const socketPath = (): string => join(folder, `${++sockets}.sock`);
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();

/** A VM with 4 MiB of memory that can be handed over, in two slots, and a word in each. */
function memfdVm({ kvm, vm, P }: On): void {
  const ram = kvm.createHostMemory({ size: 4 * MiB, kind: 'memfd' });
  vm.createMemslot({ slot: 3, address: 0, size: 2 * MiB, hostMemory: ram });
  vm.createMemslot({ slot: 7, address: 8 * MiB, size: 2 * MiB, hostMemory: ram, hostOffset: 2 * MiB, readonly: true });
  vm.memory.write(P, Buffer.from('low'));
  vm.memory.write(8 * MiB, Buffer.from('high'));
}

const layout = (vm: Vm): unknown =>
  [...vm.memslots.values()].map(({ slot, address, size, hostOffset, readonly, logDirtyPages, hostMemory }) => [
    ...[slot, address, size, hostOffset, readonly, logDirtyPages, hostMemory?.kind, hostMemory?.size],
  ]);

t.test('to a successor', async (t) => {
  await everywhere(t, 'seed 3.6: the memory of a VM is handed over without a copy', async (t, world) => {
    const { vm, P, backend } = world;
    memfdVm(world);
    using successor = backend.open();
    const path = socketPath();
    const [report, taken] = await Promise.all([
      handOver(vm, { path, prepare: async () => Buffer.from('registers') }),
      takeOver(successor, { path }),
    ]);
    t.equal(report.bytes, 4 * MiB);
    t.equal(text(taken.data), 'registers');
    t.same(layout(taken.vm), layout(vm));
    t.equal(text(taken.vm.memory.read(P, 3)), 'low');
    t.equal(text(taken.vm.memory.read(8 * MiB, 4)), 'high');
    taken.vm.memory.write(P, Buffer.from('new'));
    t.equal(text(vm.memory.read(P, 3)), 'new', 'it is the same memory, not a copy');
    t.equal(vm.frozen, true, 'the predecessor stays frozen');
    refused(t, () => vm.memory.write(P, Buffer.from('no')), 'EPERM', 'handed over');
    vm.close();
    using agent = GuestAgent.boot(taken.vm, { address: MiB });
    t.equal(text(agent.read(P, 3)), 'new');
    agent.write(2 * P, Buffer.from('by the guest'));
    t.equal(text(taken.vm.memory.read(2 * P, 12)), 'by the guest');
  });

  await everywhere(t, 'seed 3.6: frozen meanwhile, and thawed by a cancel', async (t, world) => {
    const { vm, P, kvm, backend } = world;
    memfdVm(world);
    using agent = GuestAgent.boot(vm, { address: MiB });
    const memory = [...vm.memslots.values()][0]?.hostMemory;
    const path = socketPath();
    const cancel = new AbortController();
    const offer = rejection(handOver(vm, { path, signal: cancel.signal }));
    agent.write(P, Buffer.from('nobody is there, so the guest runs'));
    // A successor that takes the fds and says nothing.
    using other = backend.open();
    const { kernel } = other.backing;
    const fd = kernel.socket(SOCK_SEQPACKET);
    t.equal(kernel.connect(fd, path), 0);
    kernel.sendmsg(fd, BUILT, []);
    while (!vm.frozen) await wait(1);
    const notNow: Record<string, () => unknown> = {
      'the guest runs': () => agent.read(P, 1),
      'a page comes': () => vm.memory.write(0, Uint8Array.of(1)),
      'pages go': () => memory?.discard({ offset: 0, size: P }),
      'a slot comes': () => vm.createMemslot({ address: 64 * MiB, size: P, hostMemory: memory as never }),
      'a slot goes': () => vm.memslots.get(3)?.remove(),
      'a slot moves': () => vm.memslots.get(3)?.move(128 * MiB),
      'a file comes': () => vm.createGuestMemfd({ size: P }),
      'a page changes sides': () => vm.convertSync({ address: 0, size: P }, 'private'),
      'an attribute is set': () => vm.setMemoryAttributes({ address: 0, size: P }, { private: true }),
    };
    for (const [what, call] of Object.entries(notNow))
      t.equal(refused(t, call, 'EPERM').errno, -ERRNO.EPERM, `not now: ${what}`);
    t.equal((await rejection(vm.convert({ address: 0, size: P }, 'private'))).code, 'EPERM');
    t.equal((await rejection(handOver(vm, { path: socketPath() }))).code, 'EPERM');
    t.equal(text(vm.memory.read(P, 6)), 'nobody', 'it can be read');
    cancel.abort(new Error('not now'));
    t.equal((await offer).message, 'not now');
    kernel.close(fd);
    t.equal(vm.frozen, false);
    agent.write(P, Buffer.from('goes on'));
    memory?.discard({ offset: 0, size: P });
    vm.memslots.get(7)?.remove();
    t.equal(text(vm.memory.read(P, 7)), 'goes on');
    t.equal(kvm.closed, false);
  });

  await everywhere(t, 'seed 3.6: thawed when the successor dies', async (t, world) => {
    const { vm, P, backend } = world;
    memfdVm(world);
    const path = socketPath();
    const offer = rejection(handOver(vm, { path }));
    using other = backend.open();
    const { kernel } = other.backing;
    const fd = kernel.socket(SOCK_SEQPACKET);
    kernel.connect(fd, path);
    kernel.sendmsg(fd, BUILT, []);
    while (!vm.frozen) await wait(1);
    kernel.close(fd);
    t.match(await offer, { code: 'EPIPE', message: /successor went away/ });
    t.equal(vm.frozen, false);
    vm.memory.write(P, Buffer.from('and'));
    const second = socketPath();
    const [, { vm: taken }] = await Promise.all([handOver(vm, { path: second }), takeOver(other, { path: second })]);
    t.equal(text(taken.memory.read(P, 3)), 'and', 'the next one has it');
  });

  await everywhere(t, 'seed 3.6: the layout may change until the VM is frozen', async (t, world) => {
    const { vm, kvm, P, backend } = world;
    memfdVm(world);
    using successor = backend.open();
    const path = socketPath();
    const prepare = (): Uint8Array => {
      t.equal(vm.frozen, false, 'the guest may still run');
      vm.memslots.get(7)?.remove();
      const more = kvm.createHostMemory({ size: P, kind: 'memfd' });
      vm.createMemslot({ address: 64 * MiB, size: P, hostMemory: more });
      vm.memory.write(64 * MiB, Buffer.from('late'));
      return Buffer.from('registers');
    };
    const [, taken] = await Promise.all([handOver(vm, { path, prepare }), takeOver(successor, { path })]);
    t.same(layout(taken.vm), layout(vm));
    t.equal(text(taken.vm.memory.read(64 * MiB, 4)), 'late');
    t.equal(text(taken.data), 'registers');
  });

  await everywhere(t, 'seed 3.6: what cannot be handed over is refused before anybody waits', async (t, world) => {
    const { vm, kvm, P } = world;
    const path = socketPath();
    t.equal((await rejection(takeOver(kvm, { path }))).code, 'ENOENT');
    const slot = vm.createMemslot({ address: 0, size: P, hostMemory: world.host(1) });
    t.match(await rejection(handOver(vm, { path })), { code: 'UNSUPPORTED', message: /anonymous memory.*memfd/ });
    slot.remove();
    const file = vm.createGuestMemfd({ size: P, mmap: true, initShared: true });
    vm.createMemslot({ address: 0, size: P, guestMemfd: file });
    t.match(await rejection(handOver(vm, { path })), {
      code: 'UNSUPPORTED',
      message: /guest_memfd.*KVM_LINK_GUEST_MEMFD/,
    });
    t.equal(vm.frozen, false);
    vm.close();
    t.equal((await rejection(handOver(vm, { path }))).code, 'ERR_CLOSED');
  });
});

/** Takes over from a process that may not be there yet: its socket has a name before it listens. */
async function waited(kvm: Kvm, path: string): Promise<TakenMemory> {
  for (;;) {
    try {
      return await takeOver(kvm, { path });
    } catch (error) {
      if (!['ENOENT', 'ECONNREFUSED'].includes((error as KvmError).code)) throw error;
      await wait(5);
    }
  }
}

t.test('between processes', async (t) => {
  const onRealKvm = backends.filter(({ name }) => name === 'kvm');
  await everywhere(
    t,
    'seed 3.4, seed 3.6: a process gives its memory away and is gone',
    async (t, { kvm }) => {
      const path = socketPath();
      const ended = child('hand_over_child', 'predecessor', path);
      const { vm, data } = await waited(kvm, path);
      const { code, output, errors } = await ended;
      t.equal(code, 0, errors);
      t.equal(output, `${8 * MiB}\n`);
      t.not(Number(text(data)), process.pid);
      using agent = GuestAgent.boot(vm, { address: 0 });
      t.equal(text(agent.read(4 * MiB, 31)), 'from a guest of another process');
      const next = socketPath();
      agent.close();
      const [, last] = await Promise.all([handOver(vm, { path: next }), child('hand_over_child', 'successor', next)]);
      t.equal(last.output, 'from a gu\n', last.errors);
    },
    onRealKvm,
  );

  await everywhere(
    t,
    'seed 3.6: a successor that is killed gives the memory back',
    async (t, world) => {
      const { vm, P } = world;
      memfdVm(world);
      const path = socketPath();
      const [error, { signal }] = await Promise.all([
        rejection(handOver(vm, { path })),
        child('hand_over_child', 'dies', path),
      ]);
      t.equal(signal, 'SIGKILL');
      t.equal(error.code, 'EPIPE');
      t.equal(vm.frozen, false);
      vm.memory.write(P, Buffer.from('mine'));
    },
    onRealKvm,
  );
});

t.test('to systemd', async (t) => {
  await everywhere(t, 'seed 3.6: systemd keeps the memory while the service restarts', async (t, world) => {
    const { vm, kvm, P } = world;
    const ram = kvm.createHostMemory({ size: 8 * MiB, kind: 'memfd' });
    vm.createMemslot({ address: 0, size: 8 * MiB, hostMemory: ram });
    vm.memory.write(4 * MiB, Buffer.from('kept here'));
    const { kernel } = kvm.backing;
    const systemd = kernel.socket(SOCK_DGRAM);
    t.teardown(() => delete process.env.NOTIFY_SOCKET);
    if (kvm.backend === 'software') {
      refused(t, () => storeInSystemd(vm), 'UNSUPPORTED', 'software kernel');
      refused(t, () => takeFromSystemd(kvm), 'UNSUPPORTED', 'software kernel');
      return;
    }
    refused(t, () => storeInSystemd(vm), 'UNSUPPORTED', 'NOTIFY_SOCKET');
    const path = socketPath();
    process.env.NOTIFY_SOCKET = path;
    t.equal(refused(t, () => storeInSystemd(vm), 'ENOENT').syscall, 'connect');
    t.equal(vm.frozen, false);
    t.equal(kernel.bind(systemd, path), 0);
    t.throws(() => storeInSystemd(vm, { name: 'a:b' }), { code: 'ERR_OUT_OF_RANGE' });
    const heard = (): [string, number[]] => {
      const [target, fds] = [new Uint8Array(256), [] as number[]];
      const length = kernel.recvmsg(systemd, target, fds);
      return [text(target.subarray(0, Math.max(0, length))), fds];
    };
    const stored = storeInSystemd(vm, { name: 'vm', data: Buffer.from('registers') });
    t.equal(stored.bytes, 8 * MiB);
    const [image, memory] = [heard(), heard()];
    t.equal(image[0], 'FDSTORE=1\nFDNAME=vm.0');
    t.equal(memory[0], 'FDSTORE=1\nFDNAME=vm.1');
    refused(t, () => vm.memory.write(P, Uint8Array.of(1)), 'EPERM', 'systemd');
    refused(t, () => takeFromSystemd(kvm, { name: 'vm' }), 'ENOENT', "'vm'");
    // The next start: systemd passes what it has from fd 3 on, in whatever order.
    const program = fileURLToPath(new URL('lifecycle/hand_over_child.js', import.meta.url));
    const kept = [memory[1][0] as number, image[1][0] as number];
    const restarted = spawn(process.execPath, [program, 'restarted'], {
      env: {},
      stdio: ['ignore', 'pipe', 'inherit', 'ignore', ...kept],
    });
    let output = '';
    restarted.stdout?.on('data', (data) => {
      output += data;
    });
    t.same(await once(restarted, 'close'), [0, null]);
    t.equal(output, 'registers: kept here\n');
    for (const fd of kept) kernel.close(fd);
    stored.cancel();
    stored.cancel();
    t.same([heard()[0], heard()[0], heard()[0]], ['FDSTOREREMOVE=1\nFDNAME=vm.0', 'FDSTOREREMOVE=1\nFDNAME=vm.1', '']);
    t.equal(vm.frozen, false);
    vm.memory.write(P, Uint8Array.of(1));
    kernel.close(systemd);
  });

  await everywhere(t, 'seed 3.6: across kexec only where the host can', async (t, { vm }) => {
    refused(t, () => preserveAcrossKexec(vm), 'UNSUPPORTED', '/dev/liveupdate');
  });
});

t.test('to a second VM and back', async (t) => {
  await everywhere(t, 'seed 3.8: a part of a running VM is a second VM’s for a while', async (t, world) => {
    const { kvm, vm, P } = world;
    const ram = kvm.createHostMemory({ size: 8 * MiB, kind: 'memfd' });
    const slot = vm.createMemslot({ slot: 4, address: 0, size: 8 * MiB, hostMemory: ram });
    using agent = GuestAgent.boot(vm, { address: 0 });
    using sidecar = kvm.createVm();
    const own = kvm.createHostMemory({ size: MiB });
    sidecar.createMemslot({ address: 0, size: MiB, hostMemory: own });
    using other = GuestAgent.boot(sidecar, { address: 0 });
    agent.write(4 * MiB, Buffer.from('for the sidecar'));
    agent.write(6 * MiB, Buffer.from('stays'));

    const range = { address: 4 * MiB, size: MiB };
    const carved = CarveOut.create(vm, range, { to: sidecar, address: 2 * MiB });
    t.equal(text(other.read(2 * MiB, 15)), 'for the sidecar', 'the sidecar’s guest has it');
    t.equal(text(agent.read(6 * MiB, 5)), 'stays', 'the donor’s guest runs on');
    refused(t, () => agent.read(4 * MiB, 1), 'EFAULT', 'no memslot');
    refused(t, () => vm.memory.read(5 * MiB - 1, 1), 'EFAULT');
    t.equal(slot.removed, true);
    const ledger = (): unknown[] =>
      CarveOut.ledger(vm).map(({ range: { address, size }, holder, address: at, carveOut }) => [
        ...[address / MiB, size / MiB, holder === vm ? 'donor' : 'sidecar', at / MiB, carveOut !== null],
      ]);
    t.same(ledger(), [
      [0, 4, 'donor', 0, false],
      [4, 1, 'sidecar', 2, true],
      [5, 3, 'donor', 5, false],
    ]);
    refused(t, () => vm.createMemslot({ address: 32 * MiB, size: 8 * MiB, hostMemory: ram }), 'EBUSY', 'carved out');
    other.write(2 * MiB, Buffer.from('from the sidecar'));

    // The donor may go on giving, and has it back in the reverse order.
    const second = CarveOut.create(vm, { address: 5 * MiB, size: MiB }, { to: sidecar });
    refused(t, () => carved.return(), 'EBUSY', 'later');
    const device = sidecar.addMemoryUser({ name: 'vhost' });
    const hold = device.hold({ address: 5 * MiB, size: P });
    t.match(
      refused(t, () => second.return(), 'EAGAIN', 'vhost'),
      { args: { holders: ['vhost'] } },
    );
    hold.release();
    other.write(5 * MiB, Buffer.from('secret of the sidecar'));
    second.return({ content: 'zero' });
    carved.return();
    carved.return();
    t.equal(carved.returned, true);
    refused(t, () => other.read(2 * MiB, 1), 'EFAULT');
    t.equal(text(agent.read(4 * MiB, 16)), 'from the sidecar');
    t.same([...agent.read(5 * MiB, 4)], [0, 0, 0, 0], 'what was returned empty');
    t.same(ledger(), [[0, 8, 'donor', 0, false]]);
    t.equal(vm.memslotAt(0)?.slot, 4);

    // A sidecar that is gone has returned its part.
    const third = CarveOut.create(vm, range, { to: sidecar });
    other.close();
    sidecar.close();
    third[Symbol.dispose]();
    t.equal(text(agent.read(4 * MiB, 16)), 'from the sidecar');
  });

  await everywhere(t, 'seed 3.8: a carve-out that cannot be changes nothing', async (t, world) => {
    const { kvm, vm, P, backend } = world;
    const ram = kvm.createHostMemory({ size: 16 * P, kind: 'memfd' });
    vm.createMemslot({ address: 0, size: 16 * P, hostMemory: ram });
    const other = kvm.createVm();
    other.createMemslot({ address: 0, size: P, hostMemory: world.host(1) });
    const range = { address: 4 * P, size: 2 * P };
    using foreign = backend.open();
    refused(t, () => CarveOut.create(vm, range, { to: vm }), 'EINVAL');
    refused(t, () => CarveOut.create(vm, range, { to: foreign.createVm() }), 'EINVAL');
    refused(t, () => CarveOut.create(vm, { address: 15 * P, size: 2 * P }, { to: other }), 'EFAULT');
    refused(t, () => CarveOut.create(vm, { address: 1, size: P }, { to: other }), 'EINVAL');
    refused(t, () => CarveOut.create(vm, range, { to: other, address: 0 }), 'EEXIST');
    const user = vm.addMemoryUser({ name: 'nvme' });
    const hold = user.hold({ address: 5 * P, size: P });
    refused(t, () => CarveOut.create(vm, range, { to: other }), 'EAGAIN', 'nvme');
    hold.release();
    t.same(
      [...vm.memslots.values()].map(({ slot, address, size }) => [slot, address, size]),
      [[0, 0, 16 * P]],
    );
    const file = vm.createGuestMemfd({ size: 4 * P, mmap: true, initShared: true });
    vm.createMemslot({ address: 32 * P, size: 4 * P, guestMemfd: file });
    const ofFile = { address: 33 * P, size: P };
    refused(t, () => CarveOut.create(vm, ofFile, { to: other }), 'UNSUPPORTED', 'KVM_LINK_GUEST_MEMFD');
  });

  t.test('seed 3.8: a guest_memfd, by the proposed link (software 7.3 x86_64)', async (t) => {
    using kvm = Kvm.open({ backend: 'software', model: { proposals: ['link'] } });
    using vm = kvm.createVm();
    using sidecar = kvm.createVm();
    const P = kvm.pageSize;
    const file = vm.createGuestMemfd({ size: 4 * MiB, mmap: true, initShared: true });
    vm.createMemslot({ address: 0, size: 4 * MiB, guestMemfd: file });
    sidecar.createMemslot({ address: 0, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
    const [agent, other] = [GuestAgent.boot(vm, { address: 0 }), GuestAgent.boot(sidecar, { address: 0 })];
    agent.write(2 * MiB, Buffer.from('one file'));
    const carved = CarveOut.create(vm, { address: 2 * MiB, size: MiB }, { to: sidecar });
    t.equal(text(other.read(2 * MiB, 8)), 'one file');
    other.write(2 * MiB + P, Buffer.from('two VMs'));
    refused(t, () => agent.read(2 * MiB, 1), 'EFAULT');
    carved.return();
    t.equal(text(agent.read(2 * MiB + P, 7)), 'two VMs');

    // The pages stay as long as one of the VMs has them, also over a hand-over.
    const path = socketPath();
    using successor = Kvm.open({ backend: 'software', model: { proposals: ['link'] } });
    agent.close();
    const [, taken] = await Promise.all([handOver(vm, { path }), takeOver(successor, { path })]);
    vm.close();
    t.equal(text(taken.vm.memory.read(2 * MiB, 8)), 'one file');
    other.close();
  });

  t.test('the link at the boundary', async (t) => {
    const s = new World(t, ['link']);
    const { kernel } = s;
    const [vm, second] = [s.vm(), s.vm()];
    const link = (to: number, args: { fd: number; flags: number }): string => describe(kernel.linkGuestMemfd(to, args));
    const file = s.gmem(vm, 4, MMAP | INIT_SHARED);
    t.equal(link(second, { fd: file, flags: 1 }), 'EINVAL');
    t.equal(link(second, { fd: 999, flags: 0 }), 'EBADF');
    t.equal(link(second, { fd: s.memfd(1), flags: 0 }), 'EINVAL');
    t.equal(link(vm, { fd: file, flags: 0 }), 'EINVAL', 'it is this VM’s already');
    t.equal(link(s.vm(1), { fd: file, flags: 0 }), 'EINVAL', 'a VM of another type');
    const linked = kernel.linkGuestMemfd(second, { fd: file, flags: 0 });
    t.ok(linked >= 0);
    kernel.fallocate(file, 1, 0, 4 * s.P);
    s.closeFd(file);
    const status: { cache?: number } = {};
    kernel.cachestat(linked, 0, 0, status);
    t.equal(status.cache, 4, 'the last file to go frees the pages');
    kernel.close(linked);
    onLinux(t, (linux) => {
      const on = linux.vm();
      t.match(describe(linux.kernel.linkGuestMemfd(on, { fd: -1, flags: 0 })), /ENOTTY|EINVAL/);
      t.match(linux.kernel.explain() ?? '', /only proposed/);
    });
  });
});

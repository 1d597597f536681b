// Guest memory that changes hands: to a successor over a socket, to systemd, to a second VM and back.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import {
  GuestAgent,
  handOver,
  MiB,
  preserveAcrossKexec,
  storeInSystemd,
  takeFromSystemd,
  takeOver,
  type Vm,
} from '../lib/index.ts';
import { ERRNO, SOCK_DGRAM, SOCK_SEQPACKET } from '../lib/uapi.ts';
import { backends, everywhere, refused, rejection, type World } from './backends.ts';
import { child } from './lifecycle/child_process.ts';

const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-'));
t.teardown(() => rmSync(folder, { recursive: true }));
let sockets = 0;
const socketPath = (): string => join(folder, `${++sockets}.sock`);
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString();

/** A VM with 4 MiB of memory that can be handed over, in two slots, and a word in each. */
function memfdVm({ kvm, vm, P }: World): void {
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
    while (!vm.frozen) await wait(1);
    kernel.close(fd);
    t.match(await offer, { code: 'EPIPE', message: /successor went away/ });
    t.equal(vm.frozen, false);
    vm.memory.write(P, Buffer.from('and'));
    const second = socketPath();
    const [, { vm: taken }] = await Promise.all([handOver(vm, { path: second }), takeOver(other, { path: second })]);
    t.equal(text(taken.memory.read(P, 3)), 'and', 'the next one has it');
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

t.test('between processes', async (t) => {
  const onRealKvm = backends.filter(({ name }) => name === 'kvm');
  await everywhere(
    t,
    'seed 3.4, seed 3.6: a process gives its memory away and is gone',
    async (t, { kvm }) => {
      const path = socketPath();
      const ended = child('hand_over_child', 'predecessor', path);
      while (!existsSync(path)) await wait(5);
      const { vm, data } = await takeOver(kvm, { path });
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

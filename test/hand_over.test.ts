// Guest memory that changes hands: to a successor over a socket, to systemd, to a second VM and back.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as wait } from 'node:timers/promises';
import t from 'tap';
import { GuestAgent, handOver, MiB, takeOver, type Vm } from '../lib/index.ts';
import { ERRNO, SOCK_SEQPACKET } from '../lib/uapi.ts';
import { everywhere, refused, rejection, type World } from './backends.ts';

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

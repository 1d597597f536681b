import { spawnSync } from 'node:child_process';
import { rmSync, truncateSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { GuestAgent, type HostMemory, Kvm, MiB, type Vm } from '../lib/index.ts';
import { backendNames, backends, everywhere, refused, rejection, type World, withPrivate } from './backends.ts';

// Locked memslots: what a lock asks for, what it promises, and what it keeps others from.

/** A slot behind the agent's own memory, and the host memory it shows. */
function locked({ vm, kvm, P }: World, pages = 16, options: { readonly?: boolean; logDirtyPages?: boolean } = {}) {
  const memory = kvm.createHostMemory({ size: pages * P, kind: 'memfd' });
  const slot = vm.createMemslot({ slot: 5, address: 16 * MiB, size: pages * P, hostMemory: memory, ...options });
  return { memory, slot };
}

function boot({ vm, kvm }: World): GuestAgent {
  const ram: HostMemory = kvm.createHostMemory({ size: 4 * MiB, kind: 'memfd' });
  vm.createMemslot({ slot: 0, address: 0, size: 4 * MiB, hostMemory: ram });
  return GuestAgent.boot(vm);
}

/** Faults of the second stage so far; undefined where the kernel does not count them: on arm64. */
const faults = ({ vcpu }: GuestAgent): unknown => vcpu.statistics().pf_taken;

await everywhere(t, 'seed 4.1, seed 4.12: a slot is locked and unlocked, one by one or all of them', (t, world) => {
  const { vm, P, host } = world;
  const { slot, memory } = locked(world);
  const other = vm.createMemslot({ address: 64 * MiB, size: 4 * P, hostMemory: host(4) });
  t.equal(slot.locked, false);
  const report = slot.lock('read-write');
  t.match(report, { rights: 'read-write', residentBytes: 16 * P, by: 'process' });
  t.equal(memory.residentBytes(), 16 * P, 'every page is there');
  t.equal(slot.locked, 'read-write');
  t.same(
    vm.describe().memslots.map(({ locked }) => locked),
    ['read-write', false],
  );
  refused(t, () => slot.lock('read'), 'EBUSY', 'memslot 5', 'locked already');
  slot.unlock();
  t.equal(slot.locked, false);
  refused(t, () => slot.unlock(), 'EINVAL', 'not locked');
  t.equal(slot.lock('read').rights, 'read');
  other.lock('read-write');
  vm.unlockAll();
  t.same([slot.locked, other.locked], [false, false]);
  vm.unlockAll();
});

await everywhere(t, 'seed 4.2, seed 4.3: rights are two words, and the slot has to be there', (t, world) => {
  const { slot } = locked(world);
  for (const wrong of ['write', '', 'READ']) refused(t, () => slot.lock(wrong as 'read'), 'ERR_OUT_OF_RANGE', 'rights');
  for (const wrong of [undefined, 1, null, {}])
    refused(t, () => slot.lock(wrong as unknown as 'read'), 'ERR_INVALID_ARG_TYPE', 'rights');
  t.equal(slot.locked, false);
  slot.remove();
  refused(t, () => slot.lock('read'), 'ERR_CLOSED', 'memslot 5');
  refused(t, () => slot.unlock(), 'ERR_CLOSED', 'memslot 5');
  world.vm.close();
  refused(t, () => world.vm.unlockAll(), 'ERR_CLOSED', 'VM');
});

await everywhere(t, 'seed 4.4: not while a vCPU runs', async (t, world) => {
  const { slot } = locked(world);
  const agent = boot(world);
  const run = agent.vcpu.runAsync({ timeout: 2000 });
  refused(t, () => slot.lock('read'), 'EBUSY', 'a vCPU runs');
  t.equal(slot.locked, false);
  agent.vcpu.kick();
  await run.catch(() => {});
  slot.lock('read');
  const again = agent.vcpu.runAsync({ timeout: 2000 });
  slot.unlock();
  agent.vcpu.kick();
  await again.catch(() => {});
});

await everywhere(t, 'seed 4.5: no writable lock of a slot that is read-only or logs', (t, world) => {
  const { slot } = locked(world, 4, { readonly: true });
  refused(t, () => slot.lock('read-write'), 'EPERM', 'read-only');
  t.equal(slot.lock('read').residentBytes, 4 * world.P);
  slot.unlock();
  slot.remove();
  const logging = locked(world, 4, { logDirtyPages: true }).slot;
  refused(t, () => logging.lock('read-write'), 'EPERM', 'dirty pages');
  logging.lock('read');
  logging.setLogDirtyPages(false);
  logging.setLogDirtyPages(true);
  logging.unlock();
  logging.setLogDirtyPages(false);
  logging.lock('read-write');
  refused(t, () => logging.setLogDirtyPages(true), 'EPERM', 'memslot 5', 'dirty pages');
  t.equal(logging.logDirtyPages, false);
});

await everywhere(t, 'seed 4.6: a file that was cut cannot be locked, and nothing stays locked', (t, world) => {
  const { kvm, vm, P, backend } = world;
  // The software kernel has read the file, and does not notice what others do to it.
  if (backend.model) {
    const { slot } = locked(world);
    t.equal(slot.lock('read').residentBytes, 16 * P, 'memory of its own has no gaps');
    return;
  }
  const path = join(tmpdir(), `guest-memfd-lock-${process.pid}`);
  t.teardown(() => rmSync(path, { force: true }));
  const memory = kvm.createHostMemory({ size: 4 * P, kind: 'file', path });
  const slot = vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory });
  truncateSync(path, 2 * P);
  for (const rights of ['read', 'read-write'] as const) refused(t, () => slot.lock(rights), 'EFAULT', 'cut');
  t.equal(slot.locked, false);
  slot.move(16 * P);
  truncateSync(path, 4 * P);
  slot.lock('read-write');
});

t.test('seed 4.7: what a process may lock is a limit, and the error names it', async (t) => {
  const program = fileURLToPath(new URL('lifecycle/lock_limit.js', import.meta.url));
  for (const backend of backendNames) {
    // As an ordinary user, whom the limit is for; a root that may not become one cannot be held to it.
    const ran = spawnSync('sh', ['-c', 'ulimit -l 1024 && exec "$@"', 'sh', process.execPath, program, backend], {
      encoding: 'utf8',
    });
    t.equal(ran.status, 0, ran.stderr);
    const { lock, secret, left, after } = JSON.parse(ran.stdout) as {
      lock: { code: string; message: string };
      secret: { code: string; message: string };
      left: unknown;
      after: number;
    };
    t.test(`seed 4.7: the limit (${backend === 'kvm' ? 'kvm' : 'software 7.3 x86_64'})`, async (t) => {
      t.equal(lock.code, 'ENOMEM');
      t.match(lock.message, /2 MiB cannot be locked: this process may lock 1 MiB in all \(RLIMIT_MEMLOCK\)/);
      t.match(lock.message, /ulimit -l.*CAP_IPC_LOCK/);
      t.same(left, [false, 0], 'nothing is locked or there');
      t.equal(after, 512 * 1024, 'what fits can be');
      if (secret.code !== 'UNSUPPORTED') t.match(secret.message, /RLIMIT_MEMLOCK/);
      t.match(secret.code, /^(ENOMEM|UNSUPPORTED)$/);
    });
  }
});

await everywhere(
  t,
  'seed 4.8: after a lock no access of the guest faults, whatever the host is short of',
  (t, world) => {
    const { P } = world;
    const agent = boot(world);
    const { slot, memory } = locked(world);
    const range = { address: slot.address, size: slot.size };
    // The agent's own code, data and page tables are there from here on.
    for (const byte of [1, 2]) agent.fill(range, byte);
    agent.checksum(range);
    memory.discard({ offset: 0, size: slot.size });
    const { guestMapped } = slot.lock('read-write');
    t.equal(guestMapped, world.vm.capabilities.preFaultMemory, 'the tables are filled ahead where that can be');
    if (!guestMapped) agent.fill(range, 1);
    const before = faults(agent);
    for (let round = 2; round < 6; round++) {
      agent.fill(range, round);
      t.equal(agent.checksum(range), agent.checksum(range));
    }
    t.equal(faults(agent), before, 'not one');
    refused(t, () => memory.discard({ offset: P, size: P }), 'EBUSY', 'memslot 5 is locked');
    t.equal(memory.residentBytes(), 16 * P);
    t.equal(memory.bytes()[P], 5);
  },
);

await everywhere(t, 'seed 4.8: memory that is not locked faults when it has gone', (t, world) => {
  const { P, backend } = world;
  const agent = boot(world);
  const { slot, memory } = locked(world);
  const range = { address: slot.address, size: slot.size };
  agent.fill(range, 1);
  const before = faults(agent);
  agent.fill(range, 2);
  t.equal(faults(agent), before);
  memory.discard({ offset: 0, size: 16 * P });
  agent.fill(range, 3);
  const counted =
    typeof before === 'number' && (backend.model ? backend.model.tdp !== false : world.vm.capabilities.preFaultMemory);
  if (counted) t.ok(Number(faults(agent)) > before, 'a fault at least');
  else t.ok(faults(agent) === before || typeof before === 'number', 'nobody counts');
});

await everywhere(t, 'seed 4.8: nor does the host fault on behalf of a guest whose memory is locked', (t, world) => {
  const { kvm, P, backend } = world;
  const agent = boot(world);
  // A model has no faults of a process.
  const pages = backend.model ? 8 : 256;
  const { slot, memory } = locked(world, pages);
  const faulted = (run: () => void): number => {
    const before = process.resourceUsage().minorPageFault;
    run();
    return process.resourceUsage().minorPageFault - before;
  };
  agent.fill(slot, 1);
  memory.discard({ offset: 0, size: pages * P });
  const missing = faulted(() => agent.fill(slot, 2));
  memory.discard({ offset: 0, size: pages * P });
  slot.lock('read-write');
  // Node's own faults are among them, and seldom every time.
  const there = Math.min(...[3, 4, 5].map((byte) => faulted(() => agent.fill(slot, byte))));
  t.equal(slot.residentBytes(), pages * P);
  if (backend.model) return;
  t.ok(missing >= pages, `${missing} faults for ${pages} pages that are not there`);
  t.ok(there < pages / 4, `${there} for as many that are locked`);
  t.equal(kvm.backend, 'kvm');
});

await everywhere(t, 'seed 4.8: the first vCPU finds what was locked before it', (t, world) => {
  const { slot } = locked(world, 64);
  t.equal(slot.lock('read-write').guestMapped, false, 'no vCPU has tables yet');
  const agent = boot(world);
  agent.fill({ address: 2 * MiB, size: 8 }, 1);
  if (!world.vm.capabilities.preFaultMemory) agent.fill(slot, 1);
  const before = Number(faults(agent) ?? 0);
  agent.fill(slot, 1);
  t.ok(Number(faults(agent) ?? 0) - before < 8, 'none but for page tables of the guest itself');
});

await everywhere(t, 'seed 4.9: unlocking leaves the guest its mapping', (t, world) => {
  const agent = boot(world);
  const { slot, memory } = locked(world);
  const range = { address: slot.address, size: slot.size };
  slot.lock('read-write');
  agent.fill(range, 7);
  slot.unlock();
  const before = faults(agent);
  agent.fill(range, 8);
  t.equal(faults(agent), before);
  t.equal(memory.residentBytes(), slot.size);
  memory.discard({ offset: 0, size: slot.size });
  t.equal(memory.residentBytes(), 0, 'and the host may have it back');
});

await everywhere(t, 'seed 4.10: a lock for reading does not forbid the guest to write', (t, world) => {
  const agent = boot(world);
  const { slot, memory } = locked(world);
  slot.lock('read');
  agent.write(slot.address + 3, Uint8Array.of(9));
  t.equal(memory.bytes()[3], 9);
  t.same([...agent.read(slot.address + 3, 1)], [9]);
  t.equal(slot.locked, 'read');
});

await everywhere(t, 'seed 4.11: a locked slot stays until it is unlocked', (t, world) => {
  const { vm, P } = world;
  const { slot, memory } = locked(world);
  slot.lock('read-write');
  refused(t, () => slot.move(32 * MiB), 'EBUSY', 'memslot 5', 'moved', 'unlock it first');
  refused(t, () => slot.remove(), 'EBUSY', 'memslot 5', 'removed', 'unlock it first');
  refused(t, () => slot[Symbol.dispose](), 'EBUSY');
  refused(t, () => memory.close(), 'EBUSY', 'memslot 5');
  refused(t, () => memory[Symbol.dispose](), 'EBUSY');
  t.same([slot.address, slot.removed, memory.closed], [16 * MiB, false, false]);
  slot.move(slot.address);
  slot.unlock();
  slot.move(32 * MiB);
  slot.lock('read');
  slot.unlock();
  slot.remove();
  t.ok(slot.removed);
  memory.discard({ offset: 0, size: P });
  vm.createMemslot({ address: 0, size: P, hostMemory: memory }).lock('read');
  vm.close();
  memory.discard({ offset: 0, size: P });
  memory.close();
});

await everywhere(t, 'two slots that show the same memory: it stays locked until both let go', (t, world) => {
  const { vm, P, host } = world;
  const memory = host(8);
  const [one, two] = [0, 2].map((page) =>
    vm.createMemslot({ address: page * 64 * P, size: 6 * P, hostMemory: memory, hostOffset: page * P }),
  );
  one?.lock('read-write');
  two?.lock('read-write');
  one?.unlock();
  memory.discard({ offset: 0, size: 2 * P });
  for (const page of [2, 5, 7])
    refused(t, () => memory.discard({ offset: page * P, size: P }), 'EBUSY', `memslot ${two?.slot}`);
  two?.unlock();
  memory.discard({ offset: 0, size: 8 * P });
  t.equal(memory.residentBytes(), 0);
});

await everywhere(t, 'a guest_memfd that is all the guest sees is allocated, and cannot be punched', (t, world) => {
  const { vm, P, shared } = world;
  if (!vm.capabilities.guestMemfdInitShared) return;
  const file = shared(8);
  const slot = vm.createMemslot({ address: 0, size: 4 * P, guestMemfd: file, guestMemfdOffset: 2 * P });
  t.equal(slot.residentBytes(), 0);
  t.match(slot.lock('read-write'), { residentBytes: 4 * P, by: 'process' });
  t.equal(file.residentBytes(), 4 * P);
  refused(t, () => file.punchHole(), 'EBUSY', 'memslot');
  refused(t, () => file.punchHole({ offset: 5 * P, size: P }), 'EBUSY', `memslot ${slot.slot} is locked`);
  file.punchHole({ offset: 6 * P, size: P });
  refused(t, () => slot.remove(), 'EBUSY');
  slot.unlock();
  file.punchHole();
  t.equal(file.residentBytes(), 0);
});

await withPrivate(
  t,
  'private and shared parts: each page of the side that the guest sees, which stays so',
  async (t, world) => {
    const { vm, P, host, closed } = world;
    const [memory, file] = [host(8), closed(8)];
    const slot = vm.createMemslot({ address: 0, size: 8 * P, hostMemory: memory, guestMemfd: file });
    vm.setMemoryAttributes({ address: 2 * P, size: 3 * P }, { private: true });
    vm.createVcpu();
    t.equal(slot.lock('read-write').residentBytes, 8 * P);
    t.same([memory.residentBytes(), file.residentBytes()], [5 * P, 3 * P], 'nothing is held twice');
    const error = await rejection(vm.convert({ address: 0, size: 8 * P }, 'private'));
    t.match(error, { code: 'EAGAIN', args: { holders: [`the lock of memslot ${slot.slot}`] } });
    refused(t, () => vm.convertSync({ address: 3 * P, size: P }, 'shared'), 'EAGAIN', 'the lock of memslot');
    refused(t, () => vm.setMemoryAttributes({ address: 0, size: P }, { private: true }), 'EBUSY', 'is locked');
    t.same(
      (await vm.convert({ address: 2 * P, size: 3 * P }, 'private')).changed,
      [],
      'what is so already may stay so',
    );
    refused(t, () => file.punchHole({ offset: 2 * P, size: P }), 'EBUSY');
    memory.discard({ offset: 2 * P, size: P });
    vm.setMemoryAttributes({ address: 64 * P, size: P }, { private: true });
    slot.unlock();
    t.same((await vm.convert({ address: 0, size: 8 * P }, 'shared')).changed, [{ address: 2 * P, size: 3 * P }]);
  },
);

await everywhere(t, 'statistics: what the kernel counts, by its names', (t, world) => {
  const agent = boot(world);
  const before = agent.vcpu.statistics();
  t.ok(Object.keys(before).length >= 4);
  agent.read(0x8000, 8);
  const after = agent.vcpu.statistics();
  t.ok(Number(after.exits) > Number(before.exits), 'the agent has left its guest');
  t.same(Object.keys(after), Object.keys(before));
  t.type(world.vm.statistics(), 'object');
  agent.vcpu.close();
  refused(t, () => agent.vcpu.statistics(), 'ERR_CLOSED');
});

for (const arch of ['x86_64', 'aarch64'] as const) {
  await t.test(`seed 4.8, seed 4.11: a kernel that locks by itself (memslot-lock, software 7.3 ${arch})`, async (t) => {
    if (!backends.some(({ model }) => model)) return;
    using kvm = Kvm.open({ backend: 'software', model: { arch, proposals: ['memslot-lock'], lockLimit: 2 * MiB } });
    const vm: Vm = kvm.createVm();
    const world = { vm, kvm, P: kvm.pageSize } as World;
    t.equal(vm.capabilities.memslotLock, true);
    const agent = boot(world);
    const { slot, memory } = locked(world);
    t.match(slot.lock('read'), { by: 'kernel', guestMapped: true, residentBytes: slot.size });
    agent.fill({ address: 2 * MiB, size: 8 }, 1);
    const before = Number(faults(agent));
    agent.checksum(slot);
    t.equal(faults(agent), before, 'reads do not fault');
    agent.fill(slot, 1);
    t.equal(faults(agent), before + 16, 'writes do, once for each page');
    refused(t, () => slot.remove(), 'EBUSY');
    refused(t, () => memory.discard({ offset: 0, size: kvm.pageSize }), 'EBUSY');
    slot.unlock();
    slot.lock('read-write');
    vm.unlockAll();
    slot.remove();
    const large = kvm.createHostMemory({ size: 4 * MiB });
    const big = vm.createMemslot({ address: 32 * MiB, size: 4 * MiB, hostMemory: large });
    refused(t, () => big.lock('read'), 'ENOMEM', 'RLIMIT_MEMLOCK');
    t.equal(big.locked, false);
    big.remove();
  });
}

// The guest agent: the same script over real KVM and over software kernels, in memory that is the host's, a mappable guest_memfd's, or a pair.
import t from 'tap';
import {
  type Exit,
  GiB,
  GuestAgent,
  type GuestMemfd,
  type HostMemory,
  KiB,
  Kvm,
  MiB,
  type Vcpu,
  type Vm,
} from '../lib/index.ts';
import { unicornLibrary } from '../lib/kernel/software/unicorn_engine.ts';
import type { ModelOptions } from '../lib/model_options.ts';
import { errorOf } from './backends.ts';
import { realKernel } from './kvm_host.ts';
import { onSoftware } from './pace.ts';

type Test = typeof t;

const LOW = 8 * MiB;
const HIGH = 4 * GiB + 2 * MiB;
const HIGH_SIZE = 2 * MiB;
const HOLE = 1 * GiB;

interface Bench {
  readonly kvm: Kvm;
  readonly vm: Vm;
  /** Behind [0, LOW), and behind [HIGH, +HIGH_SIZE). */
  readonly low: HostMemory | GuestMemfd;
  readonly high: HostMemory | GuestMemfd;
}

interface Place {
  readonly name: string;
  readonly open: () => Kvm;
  readonly memory: 'host' | 'gmem';
}

const software = (name: string, model: ModelOptions, memory: Place['memory'] = 'host'): Place => ({
  name: `software ${name}, ${memory} memory`,
  open: () => Kvm.open({ backend: 'software', model }),
  memory,
});
const places: Place[] = [];
if (onSoftware)
  places.push(
    software('x86_64', {}),
    software('x86_64', {}, 'gmem'),
    software('x86_64 6.8', { kernel: '6.8' }),
    software('x86_64 without hardware paging', { tdp: false }),
    software('x86_64 without hardware paging', { tdp: false }, 'gmem'),
    software('aarch64', { arch: 'aarch64' }),
    software('aarch64', { arch: 'aarch64' }, 'gmem'),
    software('aarch64 with 64 KiB pages', { arch: 'aarch64', pageSize: 64 * KiB }),
  );

const kernel = realKernel();
const missing = 'reason' in kernel ? kernel : null;
if (missing && !missing.excusable) t.fail(missing.reason);
else if (missing) t.pass(`not on real KVM: ${missing.reason}`);
else {
  places.push({ name: 'KVM, host memory', open: () => Kvm.open({ backend: 'kvm' }), memory: 'host' });
  using kvm = Kvm.open({ backend: 'kvm' });
  using vm = kvm.createVm();
  if (vm.capabilities.guestMemfdInitShared)
    places.push({ name: 'KVM, gmem memory', open: () => Kvm.open({ backend: 'kvm' }), memory: 'gmem' });
}

function backing({ kvm, vm }: { kvm: Kvm; vm: Vm }, memory: Place['memory'], address: number, size: number) {
  if (memory === 'gmem') {
    const guestMemfd = vm.createGuestMemfd({ size, mmap: true, initShared: true });
    vm.createMemslot({ address, size, guestMemfd });
    return guestMemfd;
  }
  const hostMemory = kvm.createHostMemory({ size });
  vm.createMemslot({ address, size, hostMemory });
  return hostMemory;
}

/** A VM with memory below and above 4 GiB; gone when the test ends. */
function bench(t: Test, place: Place): Bench {
  const kvm = place.open();
  const vm = kvm.createVm();
  t.teardown(() => {
    vm.close();
    kvm.close();
  });
  const low = backing({ kvm, vm }, place.memory, 0, LOW);
  const high = backing({ kvm, vm }, place.memory, HIGH, HIGH_SIZE);
  return { kvm, vm, low, high };
}

/** Bytes without a pattern that a slip by a word, a page or a chunk would hide. */
function sample(length: number, seed = 1): Uint8Array {
  const bytes = new Uint8Array(length);
  let state = seed;
  for (let index = 0; index < length; index++) {
    state = (Math.imul(state, 1103515245) + 12345) >>> 0;
    bytes[index] = state >>> 16;
  }
  return bytes;
}

function reference(data: Uint8Array): bigint {
  const padded = new Uint8Array(Math.ceil(data.length / 8) * 8);
  padded.set(data);
  return new BigUint64Array(padded.buffer).reduce(
    (sum, word) => BigInt.asUintN(64, ((sum << 5n) | (sum >> 59n)) + word),
    0n,
  );
}

function same(t: Test, found: Uint8Array, wanted: Uint8Array, message: string): void {
  t.equal(Buffer.compare(found, wanted), 0, message);
}

for (const place of places) t.test(place.name, async (t) => everywhere(t as Test, place));

function everywhere(t: Test, place: Place): void {
  t.test('each side reads what the other wrote, at any alignment and across chunks', async (t) => {
    const { vm } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm);
    const spots: [number, number][] = [
      [MiB, 1],
      [MiB + 1, 6],
      [MiB + 5, 14],
      [MiB + 7, 9],
      [MiB + 8, 8],
      [2 * MiB - 3, 5],
      [3 * MiB + 64 * KiB - 1, 2],
      [3 * MiB + 64 * KiB - 5, 64 * KiB + 9],
      [HIGH, 4096],
      [HIGH + 3 * KiB + 1, 5000],
      [HIGH + HIGH_SIZE - 17, 17],
    ];
    for (const [address, size] of spots) {
      const where = `${address.toString(16)}, +${size}`;
      const mine = sample(size, address);
      vm.memory.write(address, mine);
      same(t as Test, agent.read(address, size), mine, `guest reads ${where}`);
      const theirs = sample(size, address + 1);
      agent.write(address, theirs);
      same(t as Test, vm.memory.read(address, size), theirs, `host reads ${where}`);
    }
    t.equal(agent.read(MiB, 0).length, 0, 'nothing to read');
    agent.write(MiB, new Uint8Array(0));
  });

  t.test('fill touches the range and nothing else', async (t) => {
    const { vm } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm);
    for (const [start, size] of [
      [HIGH + 1, 1],
      [HIGH + 9, 20_000],
      [MiB - 3, 8],
      [MiB + 256 * KiB - 11, 100],
    ] as const) {
      vm.memory.write(start - 1, new Uint8Array(size + 2).fill(0x11));
      agent.fill({ address: start, size }, 0xa5);
      const wanted = new Uint8Array(size + 2).fill(0xa5);
      wanted[0] = 0x11;
      wanted[size + 1] = 0x11;
      same(t as Test, vm.memory.read(start - 1, size + 2), wanted, `${start.toString(16)}, +${size}`);
    }
  });

  t.test('checksum is the sum it says', async (t) => {
    const { vm } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm);
    const data = sample(260 * KiB);
    vm.memory.write(MiB, data);
    for (const [offset, size] of [
      [0, 1],
      [0, 8],
      [0, 15],
      [8, 4096],
      [3, 5],
      [3, 1027],
      [4091, 13],
      [0, 256 * KiB + 21],
    ] as const) {
      const range = { address: MiB + offset, size };
      t.equal(agent.checksum(range), reference(data.subarray(offset, offset + size)), `+${offset}, ${size} bytes`);
    }
  });

  t.test('compareAndSwap replaces what is expected, and says what was there', async (t) => {
    const { vm } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm);
    const address = HIGH + 4096 - 8;
    t.equal(agent.compareAndSwap(address, 0n, 2n ** 64n - 1n), 0n);
    t.equal(agent.compareAndSwap(address, 0n, 7n), 2n ** 64n - 1n, 'not expected: it stays');
    t.equal(agent.compareAndSwap(address, -1n, 7n), 2n ** 64n - 1n);
    t.same([...vm.memory.read(address, 8)], [7, 0, 0, 0, 0, 0, 0, 0]);
    t.throws(() => agent.compareAndSwap(address + 4, 0n, 0n), { code: 'ERR_OUT_OF_RANGE' });
    t.throws(() => agent.compareAndSwap(address, 0n, 1n << 64n), { code: 'ERR_OUT_OF_RANGE' });
    t.throws(() => agent.compareAndSwap(address, 0 as unknown as bigint, 1n), { code: 'ERR_INVALID_ARG_TYPE' });
  });

  t.test('touch makes pages exist, and keeps what they hold', async (t) => {
    const { kvm, vm, high } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm);
    vm.memory.write(HIGH + 5 * 64 * KiB, Uint8Array.of(9));
    t.equal(high.residentBytes(), kvm.pageSize);
    agent.touch({ address: HIGH + 17, size: 4 * 64 * KiB }, { write: true });
    t.equal(high.residentBytes(), 4 * 64 * KiB + 2 * kvm.pageSize);
    agent.touch({ address: HIGH, size: HIGH_SIZE }, { pageSize: 64 * KiB });
    t.equal(agent.read(HIGH + 5 * 64 * KiB, 1)[0], 9);
    t.throws(() => agent.touch({ address: HIGH, size: 4096 }, { pageSize: 3000 }), { code: 'ERR_OUT_OF_RANGE' });
  });

  t.test('several agents on vCPUs of their own share the memory', async (t) => {
    const { vm } = bench(t as Test, place);
    // All of them first: a host with protected KVM takes no vCPU after the first run.
    const [spare, ...vcpus] = [0, 1, 2, 3].map(() => vm.createVcpu());
    const agents = vcpus.map((vcpu) => GuestAgent.boot(vm, { vcpu }));
    t.same(
      agents.map(({ address }) => address),
      [0, 128 * KiB, 256 * KiB],
      'one behind the other, from the first place there is',
    );
    t.equal(new Set(agents.map(({ vcpu }) => vcpu.id)).size, 3);
    let value = 0n;
    for (let round = 0; round < 4; round++) {
      for (const agent of agents) t.equal(agent.compareAndSwap(HIGH, value, ++value), value - 1n);
    }
    agents[1]?.close();
    t.equal(GuestAgent.boot(vm, { vcpu: spare as Vcpu }).address, 128 * KiB, 'the place of one that is closed is free');
    agents[2]?.write(HIGH, sample(100));
    same(t as Test, agents[0]?.read(HIGH, 100) ?? new Uint8Array(), sample(100), 'the others go on');
  });

  t.test('it lives where the caller wants it', async (t) => {
    const { kvm, vm } = bench(t as Test, place);
    const address = HIGH + HIGH_SIZE - 128 * KiB;
    const agent = GuestAgent.boot(vm, { address });
    t.equal(agent.address, address);
    agent.write(0, sample(200));
    same(t as Test, vm.memory.read(0, 200), sample(200), 'the first address is free');
    agent.write(address - 8, new Uint8Array(8));
    for (const refused of [
      () => agent.write(address - 1, new Uint8Array(2)),
      () => agent.fill({ address: 0, size: HIGH + HIGH_SIZE }, 0),
      () => agent.compareAndSwap(address + 128 * KiB - 8, 0n, 0n),
      () => agent.touch({ address, size: 1 }, { write: true }),
      () => GuestAgent.boot(vm, { address }),
      () => GuestAgent.boot(vm, { address: address - 64 * KiB }),
    ]) {
      t.throws(refused, { code: 'EBUSY' }, 'its memory is not to be written');
    }
    agent.touch({ address, size: 1 });
    t.throws(() => GuestAgent.boot(vm, { address: kvm.pageSize + 1 }), { code: 'ERR_OUT_OF_RANGE' });
    t.throws(() => GuestAgent.boot(vm, { address: HOLE }), { code: 'EFAULT' });
    t.throws(() => GuestAgent.boot(vm, { address: LOW - 64 * KiB }), { code: 'EFAULT' }, 'it ends behind the slot');
    t.throws(() => GuestAgent.boot({} as Vm), { code: 'ERR_INVALID_ARG_TYPE' });
    t.throws(() => GuestAgent.boot(vm, { onExit: 5 as never }), { code: 'ERR_INVALID_ARG_TYPE' });
  });

  t.test('an access without memory is EFAULT with its address, and the agent goes on', async (t) => {
    const { kvm, vm } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm);
    const refused: [string, number, () => unknown][] = [
      ['read', HOLE + 3, () => agent.read(HOLE + 3, 5)],
      ['read', LOW, () => agent.read(LOW - 3, 100)],
      ['write', LOW, () => agent.write(LOW - 8, new Uint8Array(16))],
      ['fill', HIGH + HIGH_SIZE, () => agent.fill({ address: HIGH + HIGH_SIZE - 20, size: 24 }, 1)],
      ['checksum', HOLE, () => agent.checksum({ address: HOLE, size: 8 })],
      ['read', HOLE, () => agent.touch({ address: HOLE, size: 8 })],
      ['read', 2 ** 39, () => agent.read(2 ** 39, 8)],
    ];
    for (const [what, errorOffset, access] of refused) {
      t.throws(access, { code: 'EFAULT', errno: -14, errorOffset, message: /no memslot is there/ });
      t.throws(access, { message: new RegExp(`guest agent, ${what} `) });
      agent.write(MiB, sample(30, errorOffset));
      same(t as Test, vm.memory.read(MiB, 30), sample(30, errorOffset), 'works after it');
    }
    t.throws(() => agent.compareAndSwap(HOLE, 0n, 1n), { code: 'EFAULT' });
    t.equal(agent.compareAndSwap(HIGH, 0n, 1n), 0n);
    const limit = kvm.arch === 'aarch64' ? 2 ** 48 : 2 ** 46;
    t.throws(() => agent.read(limit - 4, 5), { code: 'ERR_OUT_OF_RANGE' });
    t.throws(() => agent.read(-1, 5), { code: 'ERR_OUT_OF_RANGE' });
    t.throws(() => agent.fill({ address: 0, size: 1 }, 256), { code: 'ERR_OUT_OF_RANGE' });
  });

  t.test('a read-only slot gives its bytes and takes none', async (t) => {
    const { kvm, vm } = bench(t as Test, place);
    const hostMemory = kvm.createHostMemory({ size: 128 * KiB });
    const slot = vm.createMemslot({ address: HOLE, size: 128 * KiB, hostMemory, readonly: true });
    vm.memory.write(HOLE, sample(100));
    const agent = GuestAgent.boot(vm);
    same(t as Test, agent.read(HOLE, 100), sample(100), 'reads');
    const wanted = { code: 'EFAULT', errorOffset: HOLE + 4, message: new RegExp(`slot ${slot.slot} is read-only`) };
    t.throws(() => agent.write(HOLE + 4, Uint8Array.of(1)), wanted);
    same(t as Test, agent.read(HOLE, 100), sample(100), 'unchanged');
    t.throws(() => GuestAgent.boot(vm, { address: HOLE, timeout: 500 }), { code: 'EFAULT' }, 'no place for an agent');
  });

  t.test('a handler plays a device: aligned words, and bytes around them', async (t) => {
    const { vm } = bench(t as Test, place);
    const seen: [string, number, number][] = [];
    const device = sample(64);
    const onExit = (exit: Exit): 'resume' | 'stop' => {
      if (exit.reason !== 'mmio') return 'stop';
      const offset = exit.address - HOLE;
      seen.push([exit.isWrite ? 'write' : 'read', offset, exit.data.length]);
      if (exit.isWrite) device.set(exit.data, offset);
      else exit.data.set(device.subarray(offset, offset + exit.data.length));
      return 'resume';
    };
    const agent = GuestAgent.boot(vm, { onExit });
    const steps = (kind: string, start: number): [string, number, number][] =>
      [
        [5, 1],
        [6, 1],
        [7, 1],
        [8, 8],
        [16, 8],
        [24, 1],
        [25, 1],
      ].map(([offset, size]) => [kind, start + (offset as number), size as number]);
    same(t as Test, agent.read(HOLE + 5, 21), device.slice(5, 26), 'what the device answers');
    t.same(seen.splice(0), steps('read', 0));
    agent.write(HOLE + 5, sample(21, 7));
    same(t as Test, device.slice(5, 26), sample(21, 7), 'what the guest sends');
    t.same(seen.splice(0), steps('write', 0));
    agent.fill({ address: HOLE + 5, size: 21 }, 0x33);
    t.same(seen.splice(0), steps('write', 0));
    device.set(sample(64, 8));
    t.equal(agent.checksum({ address: HOLE + 8, size: 19 }), reference(device.slice(8, 27)));
    t.same(
      seen.splice(0).map(([, , size]) => size),
      [8, 8, 1, 1, 1],
    );
    t.equal(agent.checksum({ address: HOLE + 9, size: 9 }), reference(device.slice(9, 18)));
    t.same(seen.splice(0).length, 9, 'words that are not aligned come in bytes');
    agent.touch({ address: HOLE + 3, size: 2 }, { write: true });
    t.same(seen.splice(0), [
      ['read', 3, 1],
      ['write', 3, 1],
    ]);
  });

  t.test('many windows of 1 GiB: the page tables start again', async (t) => {
    const { vm } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm, {
      onExit: (exit) => {
        if (exit.reason !== 'mmio') return 'stop';
        new DataView(exit.data.buffer, exit.data.byteOffset).setUint8(0, (exit.address / GiB) % 251);
        return 'resume';
      },
    });
    vm.memory.write(HIGH, Uint8Array.of(77));
    for (const gib of [5, 6, 7, 8, 9, 10, 300, 11, 512, 513, 1000, 5, 600, 12, 1023]) {
      t.equal(agent.read(gib * GiB, 1)[0], gib % 251, `${gib} GiB`);
      t.equal(agent.read(HIGH, 1)[0], 77);
    }
  });

  t.test('requestConversion reaches the handler, and its answer the guest', async (t) => {
    const { kvm, vm } = bench(t as Test, place);
    const vcpu = vm.createVcpu();
    const { mapGpaRangeExit, preFaultMemory } = vm.capabilities;
    const asked: unknown[] = [];
    let reply: bigint | null = 0n;
    let decision: 'resume' | 'stop' = 'resume';
    const agent = GuestAgent.boot(vm, {
      onExit: (exit) => {
        if (exit.reason !== 'map-gpa-range') return 'stop';
        asked.push([exit.address, exit.size, exit.to]);
        if (reply !== null) exit.reply(reply);
        return decision;
      },
    });
    t.equal(agent.conversionBy, mapGpaRangeExit && preFaultMemory ? 'hypercall' : 'doorbell');
    if (kvm.arch === 'aarch64') t.equal(agent.conversionBy, 'doorbell');
    const range = { address: HIGH + 64 * KiB, size: 128 * KiB };
    t.equal(agent.requestConversion(range, 'private'), 0n);
    t.same(asked.splice(0), [[range.address, range.size, 'private']]);
    reply = -22n;
    t.equal(agent.requestConversion({ address: HOLE, size: 4 * KiB }, 'shared'), -22n);
    t.same(asked.splice(0), [[HOLE, 4 * KiB, 'shared']]);
    reply = 5n;
    t.equal(agent.requestConversion(range, 'shared'), 5n, 'a positive answer is the answer too');
    reply = null;
    t.equal(agent.requestConversion(range, 'shared'), 0n, 'what KVM presets');
    decision = 'stop';
    t.throws(() => agent.requestConversion(range, 'shared'), { code: 'ENOSYS', errno: -38 });
    t.equal(agent.read(HIGH, 1).length, 1, 'goes on');
    t.throws(() => agent.requestConversion({ address: 1, size: 4096 }, 'shared'), { code: 'ERR_OUT_OF_RANGE' });
    t.throws(() => agent.requestConversion(range, 'other' as never), { code: 'ERR_OUT_OF_RANGE' });
    t.throws(
      () => GuestAgent.boot(vm, { vcpu }).requestConversion(range, 'private'),
      { code: 'ENOSYS' },
      'nobody to ask',
    );
  });

  t.test('a hypercall comes back with what KVM says, or not at all', async (t) => {
    const { kvm, vm } = bench(t as Test, place);
    const emulated = kvm.arch === 'x86_64' && !vm.capabilities.preFaultMemory;
    if (emulated && vm.kvm.kernelRelease === '6.8') return;
    const agent = GuestAgent.boot(vm, { timeout: emulated ? 60 : 10_000 });
    if (emulated) {
      t.throws(() => agent.hypercall(99n, [1n]), { code: 'ETIMEDOUT' });
    } else {
      t.equal(agent.hypercall(99n, [1n, 2n, 3n, 4n]), kvm.arch === 'aarch64' ? -1n : -1000n);
      if (kvm.arch === 'x86_64') t.equal(agent.hypercall(12n, [1n, 1n, 0n]), -22n, 'not a page');
    }
    t.equal(agent.read(HIGH, 1).length, 1, 'goes on');
    t.throws(() => agent.hypercall(1n, [1n, 2n, 3n, 4n, 5n]), { code: 'ERR_OUT_OF_RANGE' });
  });

  t.test('the agent outlives a kick, a look at its registers, and a handler that throws', async (t) => {
    const { vm } = bench(t as Test, place);
    let kicks = 0;
    const agent = GuestAgent.boot(vm, {
      onExit: (exit) => {
        if (exit.reason === 'interrupted') return kicks++ > 2 ? 'stop' : 'resume';
        throw new Error('from the handler');
      },
    });
    agent.write(MiB, sample(50));
    agent.vcpu.kick();
    same(t as Test, agent.read(MiB, 50), sample(50), 'resumed after a kick');
    t.equal(kicks, 1);
    agent.vcpu.setRegisters({});
    const registers = agent.vcpu.getRegisters();
    agent.vcpu.setRegisters(registers);
    same(t as Test, agent.read(MiB, 50), sample(50), 'after its registers were set to what they are');
    kicks = 9;
    agent.vcpu.kick();
    t.throws(() => agent.read(MiB, 50), { code: 'EINTR', errno: -4 });
    t.throws(() => agent.read(HOLE, 50), { message: 'from the handler' });
    same(t as Test, agent.read(MiB, 50), sample(50), 'and after that');
  });

  t.test('a guest that crashes is started again', async (t) => {
    const { kvm, vm } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm);
    agent.write(HIGH, sample(50));
    // The page table of HIGH's window is the last one that was built.
    const entries = vm.memory.read(agent.address + 12 * KiB, 52 * KiB);
    const words = new BigUint64Array(entries.buffer);
    for (const [index, word] of words.entries())
      if ((word & 0x000f_ffff_ffe0_0000n) === BigInt(HIGH)) words[index] = 0n;
    vm.memory.write(agent.address + 12 * KiB, entries);
    const wanted =
      kvm.arch === 'aarch64'
        ? { code: 'EFAULT', errorOffset: HIGH, message: /exception, ESR_EL1 0x96000006/ }
        : { code: 'EIO', message: /triple fault/ };
    t.throws(() => agent.read(HIGH, 50), wanted);
    same(t as Test, agent.read(HIGH, 50), sample(50), 'with new page tables');
  });

  t.test('from within onExit: busy, and close ends the command', async (t) => {
    const { vm } = bench(t as Test, place);
    const vcpu = vm.createVcpu();
    const codes: unknown[] = [];
    const agent = GuestAgent.boot(vm, {
      onExit: () => {
        for (const call of [() => agent.read(0, 1), () => agent.halt()]) {
          try {
            call();
          } catch (error) {
            codes.push((error as { code: string }).code);
          }
        }
        agent.close();
        return 'resume';
      },
    });
    t.throws(() => agent.read(HOLE, 1), { code: 'ERR_CLOSED' });
    t.same(codes, ['EBUSY', 'EBUSY']);
    const bad = GuestAgent.boot(vm, { vcpu, onExit: () => 'maybe' as 'stop' });
    t.throws(() => bad.read(HOLE, 1), { code: 'ERR_INVALID_ARG_TYPE' });
    t.equal(bad.read(HIGH, 1).length, 1);
  });

  t.test('close at any point', async (t) => {
    const { vm } = bench(t as Test, place);
    const [first, second, third] = [0, 1, 2].map(() => vm.createVcpu()) as [Vcpu, Vcpu, Vcpu];
    const fresh = GuestAgent.boot(vm);
    fresh.close();
    fresh.close();
    t.ok(fresh.closed && fresh.vcpu.closed);
    const failed = GuestAgent.boot(vm, { vcpu: first });
    t.throws(() => failed.read(HOLE, 1), { code: 'EFAULT' });
    failed[Symbol.dispose]();
    const outer = GuestAgent.boot(vm, { vcpu: second });
    outer.vcpu.close();
    t.ok(outer.closed);
    const last = GuestAgent.boot(vm, { vcpu: third });
    t.equal(last.address, 0, 'places are free again');
    vm.close();
    for (const agent of [fresh, failed, outer, last]) {
      t.throws(() => agent.read(0, 1), { code: 'ERR_CLOSED' });
      t.throws(() => agent.write(0, Uint8Array.of(1)), { code: 'ERR_CLOSED' });
      t.throws(() => agent.requestConversion({ address: 0, size: 4096 }, 'shared'), { code: 'ERR_CLOSED' });
    }
    t.throws(() => GuestAgent.boot(vm), { code: 'ERR_CLOSED' });
  });

  t.test('halt is the end', async (t) => {
    const { kvm, vm } = bench(t as Test, place);
    const agent = GuestAgent.boot(vm);
    const exit = agent.halt();
    t.equal(exit.reason, kvm.arch === 'aarch64' ? 'system-event' : 'hlt');
    if (exit.reason === 'system-event') t.equal(exit.type, 1, 'shutdown');
    t.throws(() => agent.read(0, 1), { code: 'ERR_CLOSED', message: /halted/ });
    agent.close();
  });

  if (place.memory === 'gmem') {
    t.test('what is punched reads as zeros', async (t) => {
      const { vm, high } = bench(t as Test, place);
      const agent = GuestAgent.boot(vm);
      agent.fill({ address: HIGH, size: 192 * KiB }, 0xee);
      (high as GuestMemfd).punchHole({ offset: 64 * KiB, size: 64 * KiB });
      same(t as Test, agent.read(HIGH + 64 * KiB, 64 * KiB), new Uint8Array(64 * KiB), 'zeros');
      t.equal(agent.read(HIGH + 64 * KiB - 1, 1)[0], 0xee);
      t.equal(agent.read(HIGH + 128 * KiB, 1)[0], 0xee);
    });
  } else {
    t.test('the dirty log sees the guest, and nobody else', async (t) => {
      const { kvm, vm } = bench(t as Test, place);
      const { pageSize } = kvm;
      const hostMemory = kvm.createHostMemory({ size: 64 * pageSize });
      const slot = vm.createMemslot({ address: HOLE, size: 64 * pageSize, hostMemory, logDirtyPages: true });
      const agent = GuestAgent.boot(vm);
      vm.memory.write(HOLE, sample(3 * pageSize));
      agent.write(HOLE + 10 * pageSize - 1, Uint8Array.of(1, 2));
      agent.compareAndSwap(HOLE + 20 * pageSize, 0n, 1n);
      t.same(slot.dirtyPages(), [9, 10, 20]);
      agent.fill({ address: HOLE + 30 * pageSize, size: 2 * pageSize }, 1);
      agent.touch({ address: HOLE + 40 * pageSize, size: 2 * pageSize }, { write: true });
      t.same(slot.dirtyPages(), [30, 31, 40, 41]);
      agent.read(HOLE + 50 * pageSize, 100);
      t.same(slot.dirtyPages(), [], 'reads of pages that are not there write nothing');
    });
  }
}

t.test('KVM: a deadline in the middle of a command', { skip: missing?.reason ?? false }, async (t) => {
  const kvm = Kvm.open({ backend: 'kvm' });
  const vm = kvm.createVm();
  t.teardown(() => kvm.close());
  backing({ kvm, vm }, 'host', 0, 64 * MiB);
  let deadlines = 0;
  let decision: 'resume' | 'stop' = 'resume';
  const onExit = (exit: Exit): 'resume' | 'stop' => {
    if (exit.reason === 'timeout') deadlines++;
    return decision;
  };
  // One entry fills 256 KiB; where guests run on hardware that takes no time.
  const slow = kvm.arch === 'x86_64' && !vm.capabilities.preFaultMemory;
  const agent = GuestAgent.boot(vm, { timeout: slow ? 2 : 1000, onExit });
  const range = { address: MiB, size: MiB };
  agent.fill(range, 0x5c);
  same(t as Test, vm.memory.read(MiB, MiB), new Uint8Array(MiB).fill(0x5c), 'filled, deadlines or not');
  decision = 'stop';
  if (slow) {
    t.ok(deadlines > 0, 'there were some');
    t.throws(() => agent.fill(range, 0x11), { code: 'ETIMEDOUT' });
  }
  decision = 'resume';
  t.equal(agent.read(2 * MiB - 1, 1)[0], 0x5c, 'goes on, and the rest was not filled');
});

t.test('software: private memory', async (t) => {
  const start = (onExit?: (exit: Exit, vm: Vm) => 'resume' | 'stop') => {
    const kvm = Kvm.open({ backend: 'software' });
    const vm = kvm.createVm({ type: 'sw-protected' });
    t.teardown(() => kvm.close());
    const guestMemfd = vm.createGuestMemfd({ size: LOW });
    const hostMemory = kvm.createHostMemory({ size: LOW });
    vm.createMemslot({ address: 0, size: LOW, guestMemfd, hostMemory });
    const bare = vm.createMemslot({ address: HIGH, size: MiB, hostMemory: kvm.createHostMemory({ size: MiB }) });
    const agent = GuestAgent.boot(vm, onExit ? { onExit: (exit) => onExit(exit, vm) } : {});
    return { kvm, vm, agent, guestMemfd, hostMemory, bare };
  };
  const range = { address: 2 * MiB, size: 64 * KiB };

  t.test('the sides of a page hold different bytes', async (t) => {
    const { vm, agent, guestMemfd } = start();
    agent.fill(range, 0x5a);
    vm.setMemoryAttributes(range, { private: true });
    t.equal(agent.read(range.address, 1)[0], 0, 'a private page starts with zeros');
    agent.fill(range, 0xc3);
    t.throws(() => vm.memory.read(range.address, 1), { code: 'EFAULT' });
    t.equal(guestMemfd.residentBytes(), range.size);
    t.equal(agent.checksum(range), reference(new Uint8Array(range.size).fill(0xc3)));
    vm.setMemoryAttributes(range, { private: false });
    t.equal(agent.read(range.address, 1)[0], 0x5a);
    t.equal(vm.memory.read(range.address, 1)[0], 0x5a);
    vm.setMemoryAttributes(range, { private: true });
    t.equal(agent.read(range.address + range.size - 1, 2)[0], 0xc3, 'over the border of what is private');
    vm.convertSync(range, 'shared');
    vm.convertSync(range, 'private');
    t.equal(agent.read(range.address, 1)[0], 0, 'a conversion discards the other side');
  });

  t.test('the guest asks, the VMM converts', async (t) => {
    const { vm, agent } = start((exit, vm) => {
      if (exit.reason !== 'map-gpa-range') return 'stop';
      if (exit.address >= HIGH) exit.reply(-22n);
      else {
        vm.convertSync(exit, exit.to);
        exit.reply(0n);
      }
      return 'resume';
    });
    t.equal(agent.conversionBy, 'hypercall');
    agent.write(range.address, sample(100));
    t.equal(agent.requestConversion(range, 'private'), 0n);
    t.equal(vm.attributes.state(range), 'private');
    agent.write(range.address, sample(100, 2));
    t.equal(agent.requestConversion({ address: HIGH, size: 4096 }, 'private'), -22n);
    t.equal(vm.attributes.at(HIGH), 'shared');
    t.equal(agent.requestConversion(range, 'shared'), 0n);
    same(t as Test, agent.read(range.address, 100), new Uint8Array(100), 'nothing is left of either side');
  });

  t.test('a private page without guest_memfd is a fault that says why', async (t) => {
    const { vm, agent, bare } = start();
    vm.setMemoryAttributes({ address: HIGH + 8 * KiB, size: 4 * KiB }, { private: true });
    const wanted = {
      code: 'EFAULT',
      errno: -14,
      errorOffset: HIGH + 8 * KiB,
      message: new RegExp(`memory fault at 0x.*, a private access: slot ${bare.slot} has no guest_memfd`),
    };
    t.throws(() => agent.read(HIGH, 64 * KiB), wanted);
    t.throws(() => agent.fill({ address: HIGH, size: 64 * KiB }, 7), wanted);
    t.equal(vm.memory.read(HIGH + 8 * KiB - 1, 1)[0], 7, 'what comes before it was done');
    t.equal(vm.memory.read(HIGH + 12 * KiB, 1)[0], 0, 'what comes behind it was not');
    t.throws(() => agent.read(HIGH + 8 * KiB + 5, 1), wanted);
    t.equal(agent.read(HIGH, 1)[0], 7);
  });

  t.test('a fault that is repaired is gone, one that is not is not retried for ever', async (t) => {
    let [repairs, faults] = [true, 0];
    const { vm, agent } = start((exit, vm) => {
      if (exit.reason !== 'memory-fault') return 'stop';
      faults++;
      if (repairs) vm.setMemoryAttributes(exit, { private: false });
      return 'resume';
    });
    vm.memory.write(HIGH, sample(64 * KiB));
    vm.setMemoryAttributes({ address: HIGH, size: 16 * KiB }, { private: true });
    same(t as Test, agent.read(HIGH, 64 * KiB), sample(64 * KiB), 'four repairs, and all of it was read');
    t.equal(faults, 4);
    [repairs, faults] = [false, 0];
    vm.setMemoryAttributes({ address: HIGH, size: 16 * KiB }, { private: true });
    t.throws(() => agent.read(HIGH, 1), { code: 'EFAULT', message: /again after it was handled/ });
    t.equal(faults, 1);
    t.throws(() => agent.read(HIGH, 1), { code: 'EFAULT' });
    t.equal(faults, 2, 'a new command, a new chance');
  });

  t.test('the agent keeps away from private memory, and does not survive in it', async (t) => {
    const { vm, agent } = start();
    vm.setMemoryAttributes({ address: 128 * KiB, size: 128 * KiB }, { private: true });
    t.equal(GuestAgent.boot(vm).address, 256 * KiB);
    t.throws(() => GuestAgent.boot(vm, { address: 128 * KiB }), { code: 'EFAULT' });
    vm.setMemoryAttributes({ address: 0, size: 128 * KiB }, { private: true });
    t.throws(() => agent.read(MiB, 1), { code: 'EFAULT' });
    vm.setMemoryAttributes({ address: 0, size: 128 * KiB }, { private: false });
    t.equal(agent.read(MiB, 1).length, 1, 'unless it is shared again');
  });

  t.test('without a place there is no agent', async (t) => {
    using kvm = Kvm.open({ backend: 'software' });
    using vm = kvm.createVm();
    t.throws(() => GuestAgent.boot(vm), { code: 'UNSUPPORTED' });
    vm.createMemslot({ address: 0, size: MiB, guestMemfd: vm.createGuestMemfd({ size: MiB, mmap: true }) });
    t.throws(() => GuestAgent.boot(vm), { code: 'UNSUPPORTED', message: /initShared/ });
    const hostMemory = kvm.createHostMemory({ size: 128 * KiB });
    vm.createMemslot({ address: GiB, size: 128 * KiB, hostMemory });
    t.equal(GuestAgent.boot(vm).address, GiB);
    t.throws(() => GuestAgent.boot(vm), { code: 'UNSUPPORTED' });
  });
});

t.test('software: guest code that is not the agent is no answer of the agent', async (t) => {
  using kvm = Kvm.open({ backend: 'software' });
  using vm = kvm.createVm();
  backing({ kvm, vm }, 'host', 0, LOW);
  const agent = GuestAgent.boot(vm);
  vm.memory.write(4 * KiB, Uint8Array.of(0xf4));
  agent.vcpu.setRegisters({ rip: 4096n });
  const emulated = typeof unicornLibrary() !== 'string';
  const { code, message } = errorOf(() => agent.read(MiB, 1));
  t.ok(emulated ? code !== 'UNSUPPORTED' : code === 'UNSUPPORTED', `${code}: ${message}`);
});

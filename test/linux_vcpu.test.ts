import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import v8 from 'node:v8';
import { Worker } from 'node:worker_threads';
import t from 'tap';
import type { LinuxKernel } from '../lib/kernel/linux/linux_kernel.ts';
import { ERRNO, KVM_IOEVENTFD, KVM_IRQFD, KVM_RUN, KVM_SET_USER_MEMORY_REGION } from '../lib/uapi.ts';
import { compareVersions } from './conformance/scenario.ts';
import { realKernel } from './kvm_host.ts';
import { createGuest, endless, KVM_GET_REGS, KVM_SET_REGS, portLoop } from './linux_guest.ts';
import { times } from './pace.ts';

const { EBADF, EBUSY, EEXIST, EFAULT, EINTR, EINVAL, E2BIG } = ERRNO;
const EXIT_REASON = 8;
const IMMEDIATE_EXIT = 1;
const [IO, HLT, MMIO] = [2, 5, 6];
/** How often a run has to end; GUEST_MEMFD_RUNS asks for more. */
const RUNS = Number(process.env.GUEST_MEMFD_RUNS ?? 10_000);
/** What no test waits for: a run that ends because of it has lost its kick. */
const LONG = 60_000;

const kernel = realKernel();
if ('reason' in kernel) {
  if (kernel.excusable) t.pass(`not on real KVM: ${kernel.reason}`);
  else t.fail(kernel.reason);
} else if (kernel.arch === 'x86_64') run(kernel);
else t.pass('the guests of these tests are x86-64 code');

function run(kernel: LinuxKernel): void {
  const guest = (code: readonly number[]) => createGuest(kernel, code);
  const view = (vcpu: number): DataView => {
    const page = kernel.runPage(vcpu);
    return new DataView(page.buffer, page.byteOffset, page.byteLength);
  };

  t.test('a guest writes to a port, again and again, and halts', async (t) => {
    const { vcpu, close } = guest([0xb0, 0x41, 0xe6, 0x80, 0xe6, 0x81, 0xf4]);
    const exit = view(vcpu);
    for (const port of [0x80, 0x81]) {
      t.equal(kernel.run(vcpu, LONG), 0);
      t.equal(exit.getUint32(EXIT_REASON, true), IO);
      t.equal(exit.getUint8(32), 1, 'out');
      t.equal(exit.getUint16(34, true), port);
      t.equal(exit.getUint8(Number(exit.getBigUint64(40, true))), 0x41);
    }
    t.equal(kernel.run(vcpu, LONG), 0);
    t.equal(exit.getUint32(EXIT_REASON, true), HLT);
    close();
  });

  t.test('a read from a port gives the guest what the host wrote into the page', async (t) => {
    const { vcpu, close } = guest([0xe4, 0x60, 0xe6, 0x80]);
    const exit = view(vcpu);
    t.equal(kernel.run(vcpu, LONG), 0);
    t.equal(exit.getUint8(32), 0, 'in');
    exit.setUint8(Number(exit.getBigUint64(40, true)), 0x5a);
    t.equal(kernel.run(vcpu, LONG), 0);
    t.equal(exit.getUint8(Number(exit.getBigUint64(40, true))), 0x5a);
    close();
  });

  t.test('a write where no memslot is exits with its address and bytes', async (t) => {
    // mov ax, 0x2000; mov ds, ax; mov byte [0x10], 0x77
    const { vcpu, close } = guest([0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xc6, 0x06, 0x10, 0x00, 0x77, 0xf4]);
    const exit = view(vcpu);
    t.equal(kernel.run(vcpu, LONG), 0);
    t.equal(exit.getUint32(EXIT_REASON, true), MMIO);
    t.equal(exit.getBigUint64(32, true), 0x20010n);
    t.equal(exit.getUint8(40), 0x77);
    t.equal(exit.getUint32(48, true), 1);
    t.equal(exit.getUint8(52), 1, 'write');
    close();
  });

  t.test('a deadline ends an endless guest, never early', async (t) => {
    const { vcpu, close } = guest(endless);
    let early = 0;
    let other = 0;
    for (let round = 0; round < times(RUNS); round++) {
      const start = process.hrtime.bigint();
      if (kernel.run(vcpu, 0.2) !== -EINTR) other++;
      if (process.hrtime.bigint() - start < 200_000n) early++;
    }
    t.same({ early, other }, { early: 0, other: 0 });
    for (const deadline of [0.25, 20, 3, 120, 0]) {
      const start = process.hrtime.bigint();
      t.equal(kernel.run(vcpu, deadline), -EINTR);
      t.ok(process.hrtime.bigint() - start >= BigInt(deadline * 1e6), `${deadline} ms`);
    }
    const start = process.hrtime.bigint();
    t.equal(await kernel.runAsync(vcpu, 20), -EINTR);
    t.ok(process.hrtime.bigint() - start >= 20_000_000n);
    close();
  });

  t.test('deadlines of several vCPUs at once, short and long mixed', async (t) => {
    const guests = Array.from({ length: 8 }, () => guest(endless));
    const times = await Promise.all(
      guests.map(async ({ vcpu }, index) => {
        const deadline = 5 + ((index * 7) % 8) * 5;
        const start = process.hrtime.bigint();
        const result = await kernel.runAsync(vcpu, deadline);
        return { result, early: process.hrtime.bigint() - start < BigInt(deadline * 1e6) };
      }),
    );
    t.ok(times.every(({ result, early }) => result === -EINTR && !early));
    for (const { close } of guests) close();
  });

  t.test('a kick without a run ends the next one, once', async (t) => {
    const { vcpu, close } = guest(portLoop);
    const exit = view(vcpu);
    t.equal(kernel.run(vcpu, LONG), 0);
    t.equal(kernel.kick(vcpu), 0);
    t.equal(kernel.kick(vcpu), 0);
    t.equal(kernel.run(vcpu, LONG), -EINTR);
    t.equal(exit.getUint8(IMMEDIATE_EXIT), 0, 'and leaves no trace');
    t.equal(kernel.run(vcpu, LONG), 0);
    t.equal(kernel.kick(vcpu), 0);
    t.equal(await kernel.runAsync(vcpu, LONG), -EINTR);
    t.equal(await kernel.runAsync(vcpu, LONG), 0);
    close();
  });

  t.test('what the program writes to immediate_exit is its own', async (t) => {
    const { vcpu, close } = guest(portLoop);
    const exit = view(vcpu);
    exit.setUint8(IMMEDIATE_EXIT, 1);
    t.equal(kernel.run(vcpu, LONG), -EINTR);
    t.equal(kernel.run(vcpu, LONG), -EINTR);
    t.equal(exit.getUint8(IMMEDIATE_EXIT), 1);
    exit.setUint8(IMMEDIATE_EXIT, 0);
    t.equal(kernel.run(vcpu, LONG), 0);
    close();
  });

  t.test('a deadline of 0 completes an exit and enters no guest', async (t) => {
    const { vcpu, close } = guest([0xe4, 0x60, 0xe6, 0x80]);
    const exit = view(vcpu);
    t.equal(kernel.run(vcpu, LONG), 0);
    exit.setUint8(Number(exit.getBigUint64(40, true)), 0x21);
    t.equal(kernel.run(vcpu, 0), -EINTR);
    const regs = new Uint8Array(0x90);
    t.equal(kernel.ioctlStruct(vcpu, KVM_GET_REGS, regs), 0);
    t.equal(regs[0], 0x21, 'al');
    t.equal(exit.getUint8(IMMEDIATE_EXIT), 0);
    close();
  });

  t.test('no kick from another thread is lost', async (t) => {
    const { vcpu, close } = guest(endless);
    const shared = new Int32Array(new SharedArrayBuffer(12));
    const worker = await kicker(vcpu, shared, 'one by one');
    const KICKS = times(RUNS);
    let lost = 0;
    for (let round = 0; round < KICKS; round++) {
      // Asks for one kick, which comes before, at the beginning of, or during the run.
      Atomics.add(shared, 0, 1);
      Atomics.notify(shared, 0);
      const start = performance.now();
      if (kernel.run(vcpu, 2000) !== -EINTR || performance.now() - start >= 2000) lost++;
      while (Atomics.load(shared, 1) - 1 !== round + 1 && performance.now() - start < 5000);
      // Enough to know: thousands of them would take hours.
      if (lost > 3) break;
    }
    t.equal(lost, 0);
    t.equal(kernel.run(vcpu, 1), -EINTR);
    Atomics.store(shared, 2, 1);
    Atomics.add(shared, 0, 1);
    Atomics.notify(shared, 0);
    await new Promise((resolve) => worker.once('exit', resolve));
    close();
  });

  t.test('under a storm of kicks, exits and kicks are all there', async (t) => {
    const { vcpu, close } = guest(portLoop);
    const exit = view(vcpu);
    const shared = new Int32Array(new SharedArrayBuffer(12));
    const worker = await kicker(vcpu, shared, 'storm');
    const seen = new Map<number, number>();
    for (let round = 0; round < 20_000; round++) {
      const result = kernel.run(vcpu, LONG);
      seen.set(result, (seen.get(result) ?? 0) + 1);
      if (result === 0 && exit.getUint32(EXIT_REASON, true) !== IO) seen.set(1, 1);
    }
    Atomics.store(shared, 2, 1);
    await new Promise((resolve) => worker.once('exit', resolve));
    t.same([...seen.keys()].sort(), [-EINTR, 0], `${seen.get(-EINTR)} kicked, ${seen.get(0)} exits`);
    kernel.run(vcpu, LONG);
    t.equal(kernel.run(vcpu, LONG), 0, 'and calm afterwards');
    t.equal(exit.getUint8(IMMEDIATE_EXIT), 0);
    close();
  });

  t.test('handlers of the program see no signal of ours, and all of their own', async (t) => {
    const { vcpu, close } = guest(endless);
    let seen = 0;
    const count = () => seen++;
    t.equal(kernel.run(vcpu, 1), -EINTR);
    process.on('SIGURG', count);
    for (let round = 0; round < 20; round++) t.equal(kernel.run(vcpu, 1), -EINTR);
    t.equal(await kernel.runAsync(vcpu, 5), -EINTR);
    await new Promise((resolve) => setTimeout(resolve, 20));
    t.equal(seen, 0);
    process.kill(process.pid, 'SIGURG');
    while (seen === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    t.equal(seen, 1);
    process.off('SIGURG', count);
    t.equal(kernel.run(vcpu, 1), -EINTR, 'and without the handler');
    close();
  });

  t.test('a signal for somebody else ends no run early', async (t) => {
    const { vcpu, close } = guest(endless);
    const ignore = () => {};
    process.on('SIGUSR2', ignore);
    const child = spawn('sh', ['-c', `for i in 1 2 3 4 5 6 7 8; do kill -USR2 ${process.pid}; sleep 0.01; done`]);
    const ended = new Promise((resolve) => child.once('exit', resolve));
    for (let round = 0; round < 4; round++) {
      const start = process.hrtime.bigint();
      t.equal(kernel.run(vcpu, 40), -EINTR);
      t.ok(process.hrtime.bigint() - start >= 40_000_000n);
    }
    await ended;
    process.off('SIGUSR2', ignore);
    close();
  });

  t.test('one run at a time, and no other request meanwhile', async (t) => {
    const { vcpu, close } = guest(endless);
    const running = kernel.runAsync(vcpu, LONG);
    t.equal(kernel.run(vcpu, 1), -EBUSY);
    t.equal(await kernel.runAsync(vcpu, 1), -EBUSY);
    t.equal(kernel.ioctlStruct(vcpu, KVM_GET_REGS, new Uint8Array(0x90)), -EBUSY);
    t.equal(kernel.ioctl(vcpu, 0xae9a, 0), -EBUSY);
    const range = { gpa: 0n, size: 4096n, flags: 0 };
    t.equal(kernel.preFaultMemory(vcpu, range), -EBUSY);
    t.same(range, { gpa: 0n, size: 4096n, flags: 0 });
    t.equal(kernel.kick(vcpu), 0);
    t.equal(await running, -EINTR);
    t.equal(kernel.run(vcpu, 1), -EINTR);
    close();
  });

  t.test('close ends a run on the other thread, detaches the page, and frees the number', async (t) => {
    const { vcpu, close } = guest(endless);
    const page = kernel.runPage(vcpu);
    t.equal(kernel.runPage(vcpu), page, 'the same view');
    const running = kernel.runAsync(vcpu, LONG);
    t.equal(kernel.close(vcpu), 0);
    t.equal(page.byteLength, 0);
    t.equal(await running, -EINTR);
    t.equal(kernel.run(vcpu, 1), -EBADF);
    t.equal(await kernel.runAsync(vcpu, 1), -EBADF);
    t.equal(kernel.kick(vcpu), -EBADF);
    t.throws(() => kernel.runPage(vcpu), TypeError);
    t.equal(kernel.close(vcpu), -EBADF);
    close();
  });

  t.test('a vCPU keeps its VM', async (t) => {
    const { vcpu, vm, close } = guest(portLoop);
    t.equal(kernel.createVcpu(vm, 0), -EEXIST);
    t.equal(kernel.close(vm), 0);
    t.equal(kernel.run(vcpu, LONG), 0);
    t.equal(await kernel.runAsync(vcpu, LONG), 0);
    close();
  });

  t.test('100 000 runs allocate nothing', async (t) => {
    const { vcpu, close } = guest(portLoop);
    const loop = (rounds: number): void => {
      for (let round = 0; round < rounds; round++) if (kernel.run(vcpu, 1000) !== 0) throw new Error('no exit');
    };
    loop(20_000);
    gc?.();
    const before = v8.getHeapStatistics();
    loop(100_000);
    const after = v8.getHeapStatistics();
    const bytes = after.used_heap_size - before.used_heap_size;
    t.ok(bytes < 400_000, `${bytes} bytes of heap: less than the smallest object for each`);
    t.ok(after.malloced_memory - before.malloced_memory < 100_000);
    close();
  });

  t.test('nothing is left of vCPUs that are closed', async (t) => {
    const cycle = async (): Promise<void> => {
      const { vcpu, close } = guest(portLoop);
      kernel.runPage(vcpu);
      if ((await kernel.runAsync(vcpu, LONG)) !== 0) throw new Error('no exit');
      close();
    };
    const count = () => ({
      fds: readdirSync('/proc/self/fd').length,
      pages: readFileSync('/proc/self/maps', 'utf8').match(/anon_inode:kvm/g)?.length ?? 0,
      threads: readdirSync('/proc/self/task').length,
    });
    await cycle();
    const before = count();
    for (let round = 0; round < times(50); round++) await cycle();
    t.same(count(), before);
  });

  t.test('hostile arguments', async (t) => {
    const { vcpu, vm, kvm, close } = guest(portLoop);
    for (const deadline of [-1, Number.NaN, '5', null, undefined, 5n]) {
      t.throws(() => kernel.run(vcpu, deadline as number), TypeError);
      await t.rejects(kernel.runAsync(vcpu, deadline as number), TypeError);
    }
    t.equal(kernel.run(vcpu, Number.MAX_VALUE), 0);
    t.equal(kernel.run(vcpu, Number.POSITIVE_INFINITY), 0);
    for (const fd of [-1, 0, 1, 2, 99_999, vm, kvm, 2 ** 31 - 1]) {
      t.equal(kernel.run(fd, 1), -EBADF, `fd ${fd}`);
      t.equal(kernel.kick(fd), -EBADF);
      t.equal(await kernel.runAsync(fd, 1), -EBADF);
    }
    t.equal(kernel.ioctl(vcpu, KVM_RUN, 0), -EINVAL, 'no run without a deadline');
    const duplicate = kernel.dup(vcpu);
    t.ok(duplicate >= 0);
    t.equal(kernel.run(duplicate, 1), -EBADF);
    t.equal(kernel.ioctlStruct(duplicate, KVM_GET_REGS, new Uint8Array(0x90)), 0);
    t.equal(kernel.close(duplicate), 0);

    t.equal(kernel.ioctlStruct(vcpu, KVM_GET_REGS, new Uint8Array(0x8f)), -EFAULT, 'one byte short');
    t.equal(kernel.ioctlStruct(vcpu, KVM_GET_REGS, new Uint8Array(0)), -EFAULT);
    // KVM_GET_ONE_REG, which x86 has had since 6.18.
    const known = kernel.arch === 'aarch64' || compareVersions(kernel.release, '6.18') >= 0;
    const answer = known ? -EFAULT : -EINVAL;
    t.equal(kernel.ioctlStruct(vcpu, 0x4010aeab, new Uint8Array(16)), answer, 'a struct with a pointer');
    t.equal(kernel.ioctlStruct(vm, KVM_SET_USER_MEMORY_REGION, new Uint8Array(32)), -EFAULT);
    t.equal(kernel.ioctlStruct(vcpu, 0x4008aeff, new Uint8Array(64)), -EINVAL, 'unknown to the kernel');
    t.equal(kernel.ioctlStruct(vcpu, KVM_RUN, new Uint8Array(64)), -EINVAL);
    t.equal(kernel.ioctlStruct(-1, KVM_GET_REGS, new Uint8Array(0x90)), -EBADF);
    t.throws(() => kernel.ioctlStruct(vcpu, KVM_GET_REGS, {} as Uint8Array), TypeError);
    close();
  });

  t.test('a struct is no longer than its buffer, whatever it says', async (t) => {
    const { vcpu, vm, kvm, close } = guest(portLoop);
    const GET_SUPPORTED_CPUID = 0xc008ae05;
    const cpuid = (entries: number, room: number): Uint8Array => {
      const data = new Uint8Array(8 + 40 * room);
      new DataView(data.buffer).setUint32(0, entries, true);
      return data;
    };
    const whole = cpuid(256, 256);
    t.equal(kernel.ioctlStruct(kvm, GET_SUPPORTED_CPUID, whole), 0);
    const entries = new DataView(whole.buffer).getUint32(0, true);
    t.ok(entries > 0 && entries < 256);
    t.equal(kernel.ioctlStruct(kvm, GET_SUPPORTED_CPUID, cpuid(1, 1)), -E2BIG);
    t.equal(kernel.ioctlStruct(kvm, GET_SUPPORTED_CPUID, cpuid(256, 1)), -EFAULT);
    t.equal(kernel.ioctlStruct(kvm, GET_SUPPORTED_CPUID, cpuid(0xffff_ffff, 1)), -EFAULT);
    t.equal(kernel.ioctlStruct(vcpu, 0x4008ae90, whole), 0, 'SET_CPUID2');
    t.equal(kernel.ioctlStruct(vcpu, 0x4008ae90, cpuid(100, 2)), -EFAULT);
    const indices = new Uint8Array(4 + 4 * 1024);
    t.equal(kernel.ioctlStruct(kvm, 0xc004ae02, indices), -E2BIG);
    t.ok(new DataView(indices.buffer).getUint32(0, true) > 0, 'and says how many there are');
    t.equal(kernel.ioctlStruct(kvm, 0xc004ae02, indices), 0);
    const msrs = new Uint8Array(8 + 16);
    new DataView(msrs.buffer).setUint32(0, 1, true);
    new DataView(msrs.buffer).setUint32(8, 0xc000_0080, true);
    t.equal(kernel.ioctlStruct(vcpu, 0xc008ae88, msrs), 1, 'GET_MSRS of EFER');
    new DataView(msrs.buffer).setUint32(0, 100, true);
    t.equal(kernel.ioctlStruct(vcpu, 0xc008ae88, msrs), -EFAULT);
    const shared = new Uint8Array(new SharedArrayBuffer(0x90));
    t.equal(kernel.ioctlStruct(vcpu, KVM_GET_REGS, shared), 0);
    t.equal(kernel.ioctlStruct(vcpu, KVM_SET_REGS, shared), 0);
    t.ok([-EFAULT, -EINVAL].includes(kernel.getOneReg(vcpu, 0x2030_0000_0000_0002n, new Uint8Array(7))));
    t.equal(kernel.getOneReg(vm, 0x2030_0000_0000_0002n, new Uint8Array(8)), -EBADF);
    close();
  });

  t.test('devices, interrupts and eventfds', async (t) => {
    const { vm, close } = guest(portLoop);
    t.equal(kernel.irqLine(vm, 3, 1), -ERRNO.ENXIO, 'no interrupt controller');
    const created = kernel.createVm(kernel.openKvm(), 0);
    const chip = kernel.createIrqchip(created);
    t.equal(chip, 0);
    t.equal(kernel.createIrqchip(created), -EEXIST);
    t.equal(kernel.irqLine(created, 3, 1), 0);
    const event = kernel.eventfd(0, 0);
    t.ok(event >= 0);
    t.equal(kernel.fcntlGetFd(event), 1);
    const irqfd = (fd: number) => new Uint8Array(Int32Array.of(fd, 5, 0, 0, 0, 0, 0, 0).buffer);
    t.equal(kernel.ioctlStruct(created, KVM_IRQFD, irqfd(event)), 0);
    t.equal(kernel.ioctlStruct(created, KVM_IRQFD, irqfd(vm)), -EBADF);
    t.equal(kernel.ioctlStruct(created, KVM_IRQFD, irqfd(3)), -EBADF, "not one of Node's");
    const ioevent = new Uint8Array(64);
    new DataView(ioevent.buffer).setBigUint64(8, 0x1000_0000n, true);
    new DataView(ioevent.buffer).setUint32(16, 4, true);
    new DataView(ioevent.buffer).setInt32(20, event, true);
    t.equal(kernel.ioctlStruct(created, KVM_IOEVENTFD, ioevent), 0);
    new DataView(ioevent.buffer).setInt32(20, 3, true);
    t.equal(kernel.ioctlStruct(created, KVM_IOEVENTFD, ioevent), -EBADF);
    t.equal(kernel.ioctlStruct(created, 0x4040ae77, new Uint8Array(64)), 0, 'CREATE_PIT2');
    t.equal(kernel.createDevice(created, 0xffff, 0), -ERRNO.ENODEV);
    const VFIO = 4;
    const test = kernel.createDevice(created, VFIO, 1);
    if (test === 0) {
      const device = kernel.createDevice(created, VFIO, 0);
      t.ok(device >= 0);
      t.equal(kernel.hasDeviceAttr(device, { flags: 0, group: 99, attr: 0 }), -ERRNO.ENXIO);
      t.ok(kernel.setDeviceAttr(device, { flags: 0, group: 99, attr: 0 }, new Uint8Array(4)) < 0);
      t.ok(kernel.getDeviceAttr(device, { flags: 0, group: 99, attr: 0 }, new Uint8Array(0)) < 0);
      t.equal(kernel.close(device), 0);
    }
    kernel.close(event);
    kernel.close(created);
    close();
  });

  for (const program of [
    'exit during runAsync',
    'exit after runAsync',
    'uncaught during runAsync',
    'forget runAsync',
    'terminate during runAsync',
    'terminate during run, after a kick',
    'terminate many workers',
    'worker ends during runAsync',
    'close at every moment',
  ]) {
    t.test(`child process: ${program}`, async (t) => {
      const child = spawn(process.execPath, ['--expose-gc', file('linux_vcpu_child'), program], {
        stdio: ['ignore', 'pipe', 'pipe'],
      });
      let output = '';
      child.stdout.on('data', (data) => {
        output += data;
      });
      child.stderr.on('data', (data) => {
        output += data;
      });
      const [code, signal] = await new Promise<[number | null, string | null]>((resolve) =>
        child.once('close', (...ended) => resolve(ended)),
      );
      const expected = program.startsWith('uncaught') ? 1 : 0;
      t.same({ code, signal }, { code: expected, signal: null }, output);
    });
  }
}

function file(name: string): string {
  return fileURLToPath(new URL(`./${name}.js`, import.meta.url));
}

/** Not waited for by blocking this thread, which a worker may need while it starts. */
async function kicker(vcpu: number, shared: Int32Array, mode: string): Promise<Worker> {
  const worker = new Worker(file('linux_vcpu_kicker'), { workerData: { vcpu, shared, mode } });
  await once(worker, 'message');
  return worker;
}

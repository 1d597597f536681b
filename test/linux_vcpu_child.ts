import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { isMainThread, parentPort, Worker, workerData } from 'node:worker_threads';
import { linuxKernel } from '../lib/kernel/linux/linux_kernel.ts';
import { ERRNO } from '../lib/uapi.ts';
import { createGuest, endless, portLoop } from './linux_guest.ts';
import { times } from './pace.ts';

// A process, or a worker of it, that ends in the middle of something. Argument: what.

const LONG = 60_000;
const kernel = linuxKernel();
const self = fileURLToPath(import.meta.url);
const sleep = (milliseconds: number) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** A worker that does `role` and has said that it is about to. */
async function start(role: string): Promise<{ worker: Worker; vcpu: number }> {
  const worker = new Worker(self, { workerData: { role } });
  const [vcpu] = (await once(worker, 'message')) as [number];
  return { worker, vcpu };
}

const roles: Record<string, () => void> = {
  async() {
    const { vcpu } = createGuest(kernel, endless);
    kernel.runAsync(vcpu, LONG);
    parentPort?.postMessage(vcpu);
  },
  asyncLoop() {
    const { vcpu } = createGuest(kernel, portLoop);
    kernel.runPage(vcpu);
    const again = (): unknown => kernel.runAsync(vcpu, LONG).then(again);
    again();
    parentPort?.postMessage(vcpu);
  },
  sync() {
    const { vcpu } = createGuest(kernel, endless);
    parentPort?.postMessage(vcpu);
    kernel.run(vcpu, LONG);
  },
  ends() {
    const { vcpu } = createGuest(kernel, endless);
    kernel.runAsync(vcpu, LONG);
    parentPort?.postMessage(vcpu);
    setTimeout(() => process.exit(), 20);
  },
};

const programs: Record<string, () => unknown> = {
  async 'exit during runAsync'() {
    for (let count = 0; count < 4; count++) kernel.runAsync(createGuest(kernel, endless).vcpu, LONG);
    await sleep(20);
    process.exit(0);
  },
  async 'exit after runAsync'() {
    const { vcpu } = createGuest(kernel, portLoop);
    for (let count = 0; count < 100; count++) await kernel.runAsync(vcpu, LONG);
  },
  async 'uncaught during runAsync'() {
    kernel.runAsync(createGuest(kernel, endless).vcpu, LONG);
    await sleep(20);
    throw new Error('meant to be');
  },
  'forget runAsync'() {
    // The event loop stays for the promise, no longer.
    kernel.runAsync(createGuest(kernel, endless).vcpu, 50).then((result) => {
      process.exitCode = result === -ERRNO.EINTR ? 0 : 3;
    });
    process.exitCode = 4;
  },
  async 'terminate during runAsync'() {
    for (const role of ['async', 'asyncLoop', 'async', 'asyncLoop']) {
      const { worker } = await start(role);
      await sleep(10);
      await worker.terminate();
    }
  },
  async 'terminate during run, after a kick'() {
    const { worker, vcpu } = await start('sync');
    await sleep(20);
    const ended = worker.terminate();
    kernel.kick(vcpu);
    await ended;
  },
  async 'terminate many workers'() {
    for (let round = 0; round < times(10); round++) {
      const started = await Promise.all(
        Array.from({ length: 10 }, (_, index) => start(index % 2 ? 'async' : 'asyncLoop')),
      );
      await Promise.all(started.map(({ worker }) => worker.terminate()));
    }
  },
  async 'worker ends during runAsync'() {
    const { worker } = await start('ends');
    await once(worker, 'exit');
  },
  async 'close at every moment'() {
    for (let round = 0; round < times(200); round++) {
      const guest = createGuest(kernel, round % 2 ? endless : portLoop);
      const page = kernel.runPage(guest.vcpu);
      const running = kernel.runAsync(guest.vcpu, LONG);
      for (let pause = round * 200; pause > 0; pause--);
      guest.close();
      const result = await running;
      if (page.byteLength !== 0 || (result !== -ERRNO.EINTR && (round % 2 || result !== 0))) process.exit(5);
      gc?.();
    }
  },
};

const name = isMainThread ? process.argv[2] : (workerData as { role: string }).role;
const chosen = (isMainThread ? programs : roles)[name ?? ''];
if (!chosen) throw new Error(`there is no ${name}`);
await chosen();

import { MessageChannel, receiveMessageOnPort, Worker } from 'node:worker_threads';
import { Kvm } from '../../lib/index.ts';

// What JavaScript can do with a window: clone it, post it, transfer it, detach it. Argument: backend. Nothing of it may end this process.

const backend = process.argv[2] as 'kvm' | 'software';
const report: Record<string, unknown> = {};

function attempt(what: string, call: () => unknown): void {
  try {
    report[what] = call();
  } catch (error) {
    report[what] = (error as Error).name;
  }
}

type Movable = ArrayBuffer & { transfer?(length?: number): ArrayBuffer; transferToFixedLength?(): ArrayBuffer };

for (const source of ['host', 'file', 'view'] as const) {
  const ways: Record<string, (window: Uint8Array) => unknown> = {
    clone: (window) => structuredClone(window).at(0),
    'clone the buffer': (window) => new Uint8Array(structuredClone(window.buffer) as ArrayBuffer).length > 0,
    'transfer by clone': (window) =>
      structuredClone(window.buffer as ArrayBuffer, { transfer: [window.buffer as ArrayBuffer] }),
    post: (window) => {
      const { port1, port2 } = new MessageChannel();
      port1.postMessage(window);
      const got = receiveMessageOnPort(port2)?.message as Uint8Array;
      port1.close();
      return got.at(0);
    },
    'post and transfer': (window) => {
      const { port1, port2 } = new MessageChannel();
      try {
        port1.postMessage(window, [window.buffer as ArrayBuffer]);
        return receiveMessageOnPort(port2)?.message;
      } finally {
        port1.close();
      }
    },
    'transfer to a worker': (window) => {
      const worker = new Worker('require("node:worker_threads").parentPort.once("message", (bytes) => bytes.fill(7))', {
        eval: true,
      });
      worker.on('error', () => {});
      try {
        worker.postMessage(window, [window.buffer as ArrayBuffer]);
      } catch (error) {
        void worker.terminate();
        throw error;
      }
      return 1;
    },
    'ArrayBuffer.prototype.transfer': (window) => (window.buffer as Movable).transfer?.(),
    'transfer to another length': (window) => (window.buffer as Movable).transfer?.(window.buffer.byteLength * 2),
    'transfer to nothing': (window) => (window.buffer as Movable).transfer?.(0),
    transferToFixedLength: (window) => (window.buffer as Movable).transferToFixedLength?.(),
    'slice and subarray': (window) => window.slice(0, 8).length + window.subarray(0, 8).length,
    'worker data': (window) => {
      const worker = new Worker('', { eval: true, workerData: window });
      void worker.terminate();
      return 1;
    },
  };
  for (const [way, call] of Object.entries(ways)) {
    const kvm = Kvm.open({ backend });
    const P = kvm.pageSize;
    const vm = kvm.createVm();
    const memory = kvm.createHostMemory({ size: 4 * P });
    const file = vm.createGuestMemfd({ size: 4 * P, mmap: true, initShared: true });
    const slot = vm.createMemslot({ address: 0, size: 4 * P, hostMemory: memory });
    const window = source === 'host' ? memory.bytes() : source === 'file' ? file.bytes() : vm.memory.view(0, 4 * P);
    window.fill(5);
    let moved: unknown;
    attempt(`${source}: ${way}`, () => {
      moved = call(window);
      return typeof moved === 'number' || typeof moved === 'boolean' ? moved : typeof moved;
    });
    // The object goes on as if nothing had happened, and closes; what was moved away is then harmless.
    attempt(`${source}: ${way}, again`, () => {
      const again = source === 'host' ? memory.bytes() : source === 'file' ? file.bytes() : vm.memory.view(0, 4 * P);
      again.fill(6);
      return again.length === 4 * P;
    });
    slot.remove();
    kvm.close();
    if (window.length > 0) report[`${source}: ${way}, after close`] = `${window.length} bytes attached`;
    const buffers = [moved, (moved as Uint8Array | undefined)?.buffer].filter(
      (one): one is ArrayBuffer => one instanceof ArrayBuffer,
    );
    for (const buffer of buffers) new Uint8Array(buffer).fill(9);
  }
}
(globalThis as unknown as { gc(): void }).gc();
console.log(JSON.stringify(report));

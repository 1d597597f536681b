// What the tests of VcpuWorker run on the vCPU's own thread.
import { parentPort } from 'node:worker_threads';
import { type Exit, KvmError, type Vcpu, type Vm } from '../lib/index.ts';

export interface Plan {
  readonly entry: number;
  readonly device: number;
  /** What becomes of an exit here. */
  readonly mode: 'pass' | 'odd stays' | 'leave' | 'throw' | 'kvm error' | 'no setup' | 'swallow' | 'talk';
}

let mode: Plan['mode'] = 'pass';

export function setup(vcpu: Vcpu, vm: Vm, data: unknown): void {
  const plan = data as Plan;
  mode = plan.mode;
  if (mode === 'talk') for (const said of [null, 'hello', { exit: 1 }]) parentPort?.postMessage(said);
  if (mode === 'no setup') throw new RangeError('not with me');
  if (vm.kvm.arch === 'aarch64') {
    vcpu.setRegisters({ pc: BigInt(plan.entry), x1: BigInt(plan.device) });
  } else {
    vcpu.setRegisters({ rip: BigInt(plan.entry), rflags: 2n, 'cs.base': 0n, 'cs.selector': 0n });
  }
}

export function onExit(exit: Exit): boolean {
  if (mode === 'leave') process.exit(5);
  if (mode === 'throw') throw new TypeError('thrown by the module');
  if (mode === 'kvm error') throw new KvmError({ code: 'EBUSY', errno: -16, syscall: 'ioctl', message: 'a KvmError' });
  if (mode === 'swallow') return true;
  if (mode !== 'odd stays' || (exit.reason !== 'io' && exit.reason !== 'mmio')) return false;
  const isOutput = exit.reason === 'io' ? exit.direction === 'out' : exit.isWrite;
  return isOutput && ((exit.data[0] as number) & 1) === 1;
}

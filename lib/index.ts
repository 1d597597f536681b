export { type AgentOptions, type ExitHandler, GuestAgent, type TouchOptions } from './agent/guest_agent.ts';
export type { VmCapabilities } from './capabilities.ts';
export { CarveOut, type CarveOutOptions, type LedgerEntry, type ReturnOptions } from './carve_out.ts';
export type { ConversionReport, ConvertOptions } from './conversion.ts';
export { ConversionPolicy, type ConversionPolicyOptions, type Verdict } from './conversion_policy.ts';
export { KvmError } from './errors.ts';
export type { Exit } from './exit.ts';
export { GuestMemfd } from './guest_memfd.ts';
export { GuestMemory } from './guest_memory.ts';
export type { FileRange, GuestRange, Visibility } from './guest_range.ts';
export { type FdStoreOptions, type MemoryInSystemd, storeInSystemd, takeFromSystemd } from './handover/fd_store.ts';
export {
  type HandOverOptions,
  type HandOverReport,
  handOver,
  type TakenMemory,
  type TakeOverOptions,
  takeOver,
} from './handover/hand_over.ts';
export { preserveAcrossKexec } from './handover/live_update.ts';
export { HostMemory, type HostMemoryKind, type HostMemoryOptions } from './host_memory.ts';
export { type BackendName, Kvm, type OpenOptions, type VmOptions } from './kvm.ts';
export { MemoryAttributes } from './memory_attributes.ts';
export { type ConversionNotice, type MemoryHold, MemoryUser, type MemoryUserOptions } from './memory_user.ts';
export { Memslot, type MemslotOptions } from './memslot.ts';
export type { LockReport, LockRights } from './memslot_lock.ts';
export { type ReceivedMemory, type ReceiveMemoryOptions, receiveMemory } from './migration/receive_memory.ts';
export {
  type MigrationProgress,
  type MigrationReport,
  type SendMemoryOptions,
  sendMemory,
  servePages,
} from './migration/send_memory.ts';
export type { Arch, KernelVersion, ModelOptions, Proposal } from './model_options.ts';
export type { NumaMode, NumaPolicy } from './numa.ts';
export { Pager, type PagerOptions, type PagerProgress } from './pager/pager.ts';
export type { PageContent, PageSourceModule } from './pager/source.ts';
export type { Statistics } from './statistics.ts';
export {
  GuestMemoryStore,
  type SnapshotOptions,
  type StoredVm,
  type StoreOptions,
} from './store/guest_memory_store.ts';
export type { AttachOptions } from './store/rebuild.ts';
export { type MemoryDescription, type RecordOptions, StoredMemory } from './store/stored_memory.ts';
export { GiB, KiB, MiB, TiB } from './uapi.ts';
export { type RunOptions, Vcpu } from './vcpu.ts';
export type { VcpuModule } from './vcpu_driver.ts';
export { VcpuWorker, type VcpuWorkerOptions } from './vcpu_worker.ts';
export { type GuestMemfdOptions, Vm, type VmDescription, type VmHandle } from './vm.ts';
export type { VmType } from './vm_type.ts';
